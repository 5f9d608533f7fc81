"""The blocks of a BitNet b1.58 transformer.

The block is the one of microsoft/bitnet-b1.58-2B-4T and of `BitNetForCausalLM` in
transformers: a Llama block whose linear layers are ternary, with two sub-norms, one on
the attention output before ``o_proj`` and one on the gated product before
``down_proj``. Axes are named in `model.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vaani_jax.attention import cached_attention, causal_attention, quantize_heads
from vaani_jax.errors import VaaniError
from vaani_jax.kernels import rows_matmul, ternary_matmul
from vaani_jax.norm import rms_norm
from vaani_jax.pack import PackedRows, PackedTernary
from vaani_jax.quant import (
    ActivationQuantizer,
    Split,
    TernaryQuantizer,
    TernarySpec,
    Wire,
    ternary_dot,
    whole_kernel,
)
from vaani_jax.sharding import BATCH, constrain

Array = jax.Array

PRODUCT = "product"  # what rematerialisation calls the outputs of linear layers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides what the parameters are and mean.

    Attributes:
      vocab_size: V. 0 in a config file stands for "as the tokenizer has".
      dim: D, width of the residual stream.
      n_layers: number of blocks.
      n_heads: N, query heads; D must be a multiple of 2 N.
      n_kv_heads: K, key-value heads, a divisor of N; 0 stands for N.
      ffn_dim: F; 0 stands for 8/3 D rounded to a multiple of 64.
      max_seq_len: longest sequence, in tokens; the capacity of the KV cache.
      dropout: rate on embeddings and on both branches of a block.
      activation: "swiglu" or "relu2" (squared ReLU, gated alike).
      rope_theta: base of the rotary embedding.
      norm_eps: added to the mean square in RMSNorm.
      init_std: standard deviation of initial weights; ``o_proj`` and ``down_proj``
        start with ``init_std / sqrt(2 n_layers)``.
      sub_norms: whether o_proj and down_proj have a norm of their own before them, as
        BitNet 2B4T has; False is the plain Llama block.
      tie_embeddings: whether the head reuses the embedding.
      ternary_head: whether the head is ternary too (b1.58 keeps it in full precision).
      quantize: False gives the full-precision twin: same parameters, plain products.
      threshold: tau of every BitLinear at the start, in units of mean|W|.
      weight_scale: "absmean" (b1.58) or "least_squares"; "stored" for models that were
        imported as codes and scales, which are not trained as they are.
      weight_granularity: one scale per "tensor" or per output "channel".
      activation_tracking: "token" (b1.58), or "ema" for a tracked range.
      activation_momentum: momentum of the tracked range.
      operands: dtype of the forward integers; equal results (see `TernarySpec`).
      wire: what devices send each other of ternary kernels that are cut over them
        (see `TernarySpec`).
      attention: "library" (`jax.nn.dot_product_attention`), "explicit", or "auto":
        the former on accelerators, the latter on CPUs.
      dtype: compute dtype, "float32" or "bfloat16"; parameters stay float32.
      scan_layers: one traced block under `nn.scan`: compiles faster, same results.
      remat: recompute blocks in the backward pass instead of storing them.
      remat_save: what ``remat`` stores besides the input of each block: "nothing", or
        the "products" of its linear layers in the compute dtype, which leaves norms,
        quantisers and attention to recompute: ``2 D + 2 D K / N + 2 F`` numbers more
        per token and layer, and no linear product done twice. Equal results. Goes
        with ``scan_layers``: without it, XLA on a CPU undoes rematerialisation. For 8
        layers of 512 and 2048 tokens in float32, its CPU code has 1316 MB of
        temporaries without ``remat`` (1087 with int8 operands), 222 with "nothing"
        saved and 536 with "products".
    """

    vocab_size: int = 0
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 0
    ffn_dim: int = 0
    max_seq_len: int = 64
    dropout: float = 0.0
    activation: Literal["swiglu", "relu2"] = "swiglu"
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    sub_norms: bool = True
    tie_embeddings: bool = True
    ternary_head: bool = False
    quantize: bool = True
    threshold: float = 0.5
    weight_scale: Literal["absmean", "least_squares", "stored"] = "absmean"
    weight_granularity: Literal["tensor", "channel"] = "tensor"
    activation_tracking: Literal["token", "ema"] = "token"
    activation_momentum: float = 0.99
    operands: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    wire: Wire = "2bit"
    attention: Literal["auto", "library", "explicit"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    remat: bool = False
    remat_save: Literal["nothing", "products"] = "nothing"

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise VaaniError(
                    f"model.{name} is {getattr(self, name)}: it must be at least 1"
                )
        for name in ("vocab_size", "n_kv_heads", "ffn_dim"):
            if getattr(self, name) < 0:
                raise VaaniError(
                    f"model.{name} is {getattr(self, name)}: it must be 0 (choose for"
                    " me) or positive"
                )
        if self.dim % (2 * self.n_heads):
            raise VaaniError(
                f"model.dim = {self.dim} is no multiple of 2 x n_heads ="
                f" {2 * self.n_heads}: rotary embedding needs an even head dimension"
            )
        if self.n_heads % self.kv_heads:
            raise VaaniError(
                f"model.n_kv_heads = {self.n_kv_heads} does not divide"
                f" n_heads = {self.n_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise VaaniError(f"model.dropout is {self.dropout}: it must be in [0, 1)")
        if not 0 <= self.activation_momentum < 1:
            raise VaaniError(
                f"model.activation_momentum is {self.activation_momentum}: it must be"
                " in [0, 1)"
            )
        if self.threshold < 0:
            raise VaaniError(f"model.threshold is {self.threshold}: it can't be < 0")
        if self.weight_scale == "stored" and self.weight_granularity != "tensor":
            raise VaaniError("model.weight_scale = stored has one scale per tensor")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.ffn_dim or max(64, 64 * round(8 * self.dim / 3 / 64))

    @property
    def spec(self) -> TernarySpec:
        return TernarySpec(
            self.weight_scale, self.weight_granularity, self.operands, self.wire
        )


class BitLinear(nn.Module):
    """A bias-free linear layer with ternary weights and 8-bit inputs.

    Parameters: ``kernel`` [in, features], float32 master weights, or `PackedTernary`.
    Variables in collection ``quant``: those of its two quantisers.

    Attributes:
      features: width of the output.
      config: quantiser settings (and nothing else) are read from it.
      init_std: standard deviation of the initial kernel.
      split: which side of the kernel the mesh axis ``tensor`` cuts, see `ternary_dot`.
    """

    features: int
    config: ModelConfig = ModelConfig()
    init_std: float = 0.02
    split: Split = "out"

    def setup(self) -> None:
        if self.config.quantize:
            self.weight_quantizer = TernaryQuantizer(
                self.config.threshold, self.config.spec
            )
            self.activation_quantizer = ActivationQuantizer(
                self.config.activation_tracking, self.config.activation_momentum
            )

    @nn.compact
    def kernel(self, in_features: int) -> Array | PackedTernary | PackedRows:
        """The master kernel [in_features, features], float32; or a packed one."""
        stored: Any = self.get_variable("params", "kernel")
        if isinstance(stored, PackedTernary | PackedRows):
            return stored
        return self.param(
            "kernel",
            nn.initializers.normal(self.init_std),
            (in_features, self.features),
            jnp.float32,
        )

    def __call__(
        self, x: Array, *, train: bool = False, mix: Array | None = None
    ) -> Array:
        """Maps [..., in] to [..., features], in the dtype of ``x``."""
        return project(x, (self,), train=train, mix=mix)[0]


def project(
    x: Array,
    layers: Sequence[BitLinear],
    *,
    norm: "RMSNorm | None" = None,
    train: bool = False,
    mix: Array | None = None,
) -> tuple[Array, ...]:
    """Applies several BitLinear layers to one input, which is quantised once.

    A tracked activation range is that of the first layer: the input is the same.

    Args:
      x: [..., in].
      layers: bound modules with equal quantiser settings.
      norm: applied to the input first; packed kernels do both in one call.
      train: whether tracked ranges are updated.
      mix: see `ternary_dot`.

    Returns:
      [..., features] of each layer, in ``x.dtype``.
    """
    kernels: list[Any] = [layer.kernel(x.shape[-1]) for layer in layers]
    first = layers[0]
    if isinstance(kernels[0], PackedTernary):
        tracked = first.activation_quantizer.observe(x, train=False)
        weights = None
        if norm is not None:
            weights = norm.weight(x.shape[-1]), norm.epsilon
        return ternary_matmul(x, kernels, activation_range=tracked, norm=weights)
    if norm is not None:
        x = norm(x)
    if isinstance(kernels[0], PackedRows):
        return tuple(rows_matmul(x, kernel) for kernel in kernels)
    if not first.config.quantize:
        wholes = [whole_kernel(kernel, x.dtype, first.split) for kernel in kernels]
        outputs = tuple(jnp.dot(x, kernel) for kernel in wholes)
        return checkpoint_name(outputs, PRODUCT)
    outputs = ternary_dot(
        x,
        kernels,
        [layer.weight_quantizer.tau() for layer in layers],
        spec=first.config.spec,
        scales=[layer.weight_quantizer.stored() for layer in layers],
        activation_range=first.activation_quantizer.observe(x, train=train),
        mix=mix,
        split=first.split,
    )
    # Named here, in the compute dtype: the sums within are float32 or int32.
    return checkpoint_name(outputs, PRODUCT)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in float32.

    Parameters: ``scale`` [last axis], float32.
    """

    epsilon: float = 1e-5

    @nn.compact
    def weight(self, width: int) -> Array:
        """The scale [width]."""
        return self.param("scale", nn.initializers.ones, (width,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight(x.shape[-1]), self.epsilon)


def rotary_angles(
    length: int, head_dim: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary embedding for positions 0 to ``length - 1``.

    One table for training and decoding: what is cached equals what was trained.

    Returns:
      Two arrays [length, head_dim / 2], float32.
    """
    half = head_dim // 2
    frequency = (theta ** (-np.arange(half) / half)).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency[None, :]
    wide = angle.astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def rotary_embedding(x: Array, cos: Any, sin: Any) -> Array:
    """Rotary position embedding (arXiv:2104.09864), rotate-half layout.

    Args:
      x: queries or keys [B, T, heads, H], H even.
      cos, sin: rows of `rotary_angles` for the positions of ``x``, [T, H / 2], or
        [B, T, H / 2] where rows differ.

    Returns:
      Same shape and dtype as ``x``; computed in float32.
    """
    where = (None, slice(None)) if cos.ndim == 2 else (slice(None), slice(None))
    cos, sin = cos[*where, None, :], sin[*where, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity where ``key`` is None or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _written(cache: Array, new: Array, slot: Array) -> Array:
    """``cache`` [B, S, ...] with ``new`` [B, T, ...] from ``slot`` on."""
    new = new.astype(cache.dtype)
    if cache.dtype == jnp.bfloat16:
        # As integers: XLA on a CPU would convert all of the cache to float32 and back.
        bits = jnp.uint16
        cache = jax.lax.bitcast_convert_type(cache, bits)
        new = jax.lax.bitcast_convert_type(new, bits)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)
        return jax.lax.bitcast_convert_type(cache, jnp.bfloat16)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with grouped key-value heads and rotary positions.

    Parameters: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and ``sub_norm``.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.q_proj = BitLinear(c.n_heads * c.head_dim, c, c.init_std)
        self.k_proj = BitLinear(c.kv_heads * c.head_dim, c, c.init_std)
        self.v_proj = BitLinear(c.kv_heads * c.head_dim, c, c.init_std)
        self.sub_norm = RMSNorm(c.norm_eps) if c.sub_norms else None
        self.o_proj = BitLinear(c.dim, c, c.init_std / (2 * c.n_layers) ** 0.5, "in")

    def __call__(
        self,
        x: Array,
        positions: Array,
        rotary: tuple[Any, Any],
        cache: tuple[Array, ...] | None = None,
        *,
        norm: RMSNorm | None = None,
        train: bool = False,
        mix: Array | None = None,
        start: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Attends from ``x`` [B, T, D] to itself, or to a cache that it joins.

        Args:
          x: residual stream [B, T, D].
          positions: [T], consecutive; with a cache, the slots to fill.
          rotary: cosines and sines of these positions, [T, H / 2] or [B, T, H / 2].
          cache: keys and values [B, S, K, H], filled below ``positions[0]``; in int8,
            they are codes, and their scales [B, S, K] follow.
          norm: applied to ``x`` first.
          train: whether tracked ranges are updated.
          mix: see `ternary_dot`.
          start: first slot of the cache that counts in each row, [B]; 0 where None.

        Returns:
          [B, T, D], and the cache with the new keys and values written in.
        """
        c = self.config
        q, k, v = project(
            x, (self.q_proj, self.k_proj, self.v_proj), norm=norm, train=train, mix=mix
        )
        q_BTNH = q.reshape(*q.shape[:-1], c.n_heads, c.head_dim)
        k_BTKH = k.reshape(*k.shape[:-1], c.kv_heads, c.head_dim)
        v_BTKH = v.reshape(*v.shape[:-1], c.kv_heads, c.head_dim)
        q_BTNH, k_BTKH, v_BTKH = (
            constrain(heads, BATCH, None, "tensor", None)
            for heads in (q_BTNH, k_BTKH, v_BTKH)
        )
        q_BTNH = rotary_embedding(q_BTNH, *rotary)
        k_BTKH = rotary_embedding(k_BTKH, *rotary)
        if cache is None:
            y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, c.attention)
        else:
            new: tuple[Array, ...] = (k_BTKH, v_BTKH)
            coded = cache[0].dtype == jnp.int8
            if coded:
                codes, scales = zip(*map(quantize_heads, new), strict=True)
                new = (*codes, *scales)
            cache = tuple(
                _written(old, x, positions[0])
                for old, x in zip(cache, new, strict=True)
            )
            y_BTNH = cached_attention(
                q_BTNH,
                cache[0],
                cache[1],
                positions,
                start,
                (cache[2], cache[3]) if coded else None,
            )
        y = y_BTNH.reshape(*x.shape[:-1], c.n_heads * c.head_dim)
        y = constrain(y, BATCH, None, "tensor")
        (y,) = project(y, (self.o_proj,), norm=self.sub_norm, train=train, mix=mix)
        return y, cache


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up`` (arXiv:2002.05202), with the sigmoid computed once."""
    return _swiglu_fwd(gate, up)[0]


def _swiglu_fwd(gate: Array, up: Array) -> tuple[Array, Any]:
    sigmoid = jax.nn.sigmoid(gate)
    return gate * sigmoid * up, (gate, up, sigmoid)


def _swiglu_bwd(residuals: Any, g: Array) -> tuple[Array, Array]:
    gate, up, sigmoid = residuals
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def relu2(gate: Array, up: Array) -> Array:
    """``relu(gate)^2 * up``."""
    return jnp.square(nn.relu(gate)) * up


class FeedForward(nn.Module):
    """Gated feed-forward: ``down(norm(activation(gate(x)) * up(x)))``.

    SwiGLU (arXiv:2002.05202) or its squared-ReLU form (BitNet 2B4T, arXiv:2504.12285).

    Parameters: ``gate_proj``, ``up_proj``, ``down_proj`` and ``sub_norm``.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.gate_proj = BitLinear(c.hidden_dim, c, c.init_std)
        self.up_proj = BitLinear(c.hidden_dim, c, c.init_std)
        self.sub_norm = RMSNorm(c.norm_eps) if c.sub_norms else None
        self.down_proj = BitLinear(c.dim, c, c.init_std / (2 * c.n_layers) ** 0.5, "in")

    def __call__(
        self,
        x: Array,
        *,
        norm: RMSNorm | None = None,
        train: bool = False,
        mix: Array | None = None,
    ) -> Array:
        """Maps [..., D] to [..., D]; ``norm`` is applied to ``x`` first."""
        gate, up = project(
            x, (self.gate_proj, self.up_proj), norm=norm, train=train, mix=mix
        )
        gated = swiglu if self.config.activation == "swiglu" else relu2
        hidden = constrain(gated(gate, up), BATCH, None, "tensor")
        (y,) = project(
            hidden, (self.down_proj,), norm=self.sub_norm, train=train, mix=mix
        )
        return y


def _rounded(y: Array) -> Array:
    """``y``, in a way that keeps it from being fused into the sum that it goes into.

    A multiply and an add that compiled code fuses round once, not twice. The scale of a
    branch's last product and the residual sum are such a pair, which packed kernels
    can't fuse; without it, decoding gives the same bits with them and with masters.
    Neither a barrier nor reduce_precision outlives compilation. This comparison does.
    """
    return jnp.minimum(y, jnp.finfo(y.dtype).max)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    config: ModelConfig

    def setup(self) -> None:
        self.attn_norm = RMSNorm(self.config.norm_eps)
        self.attn = MultiHeadAttention(self.config)
        self.ffn_norm = RMSNorm(self.config.norm_eps)
        self.ffn = FeedForward(self.config)

    def __call__(
        self,
        x: Array,
        cache: tuple[Array, ...] | None,
        dropout_key: Array | None,
        positions: Array,
        rotary: tuple[Any, Any],
        mix: Array | None,
        train: bool,
        start: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Maps [B, T, D] to [B, T, D]; arguments as in `MultiHeadAttention`."""
        rate = self.config.dropout
        keys: Any = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        y, cache = self.attn(
            x,
            positions,
            rotary,
            cache,
            norm=self.attn_norm,
            train=train,
            mix=mix,
            start=start,
        )
        rounded = _rounded if cache is not None else lambda y: y
        x = constrain(x + dropout(rounded(y), rate, keys[0]), BATCH, None, None)
        y = self.ffn(x, norm=self.ffn_norm, train=train, mix=mix)
        x = x + dropout(rounded(y), rate, keys[1])
        return constrain(x, BATCH, None, None), cache
