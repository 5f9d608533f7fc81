"""The language model, its KV cache, and what can be read off its parameters.

Axes, everywhere in this project:

    B batch            N query heads         D model width
    T query position   K key-value heads     F feed-forward width
    S key position     H head dimension      V vocabulary

Capitals in einsums; a suffix (``q_BTNH``) where axes change.

Parameters: ``embedding`` [V, D]; ``layers_<i>`` (or ``layers``, stacked, under
`scan_layers`), each a `TransformerBlock`; ``final_norm``; ``lm_head`` [D, V] where the
head is not tied. Kernels are [in, out]. The collection ``quant`` mirrors that tree with
what the quantisers keep: thresholds, and activation ranges where they are tracked.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.kernels import rows_matmul, ternary_matmul
from vaani_jax.layers import (
    PRODUCT,
    BitLinear,
    ModelConfig,
    RMSNorm,
    TransformerBlock,
    dropout,
    rotary_angles,
)
from vaani_jax.pack import PackedRows, take_rows
from vaani_jax.quant import TernaryQuantizer, ternarize, ternary_dot
from vaani_jax.sharding import BATCH, constrain

Array = jax.Array
Tree = Any

__all__ = ["KVCache", "ModelConfig", "Vaani", "init_variables"]


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in arrays of fixed size.

    A slot is a place along S. All rows fill the same slots; a row that is shorter than
    others begins later, and what lies in the slots before its start is padding, which
    nothing sees. Positions, for the rotary embedding, count from the start of a row.

    Attributes:
      keys, values: one [B, S, K, H] per layer, float32, bfloat16, or int8 codes; slots
        from ``length`` on are unset.
      length: slots filled, int32 scalar. Beyond the capacity S, logits are NaN: a
        traced length can't raise, and must not pass for an answer.
      start: first slot of each row, [B] int32.
      key_scales, value_scales: where keys and values are codes, one [B, S, K] float32
        per layer: ``codes * scale``, a scale for each token and head; else empty.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    start: Array
    key_scales: tuple[Array, ...] = ()
    value_scales: tuple[Array, ...] = ()

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; almost all of them keys and values."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def layers(self) -> list[tuple[Array, ...]]:
        """What each layer reads: keys and values, then their scales if any."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return list(zip(*filter(None, parts), strict=True))

    def filled(self, layers: Sequence[tuple[Array, ...]], length: Array) -> "KVCache":
        """This cache with other contents, given as `layers` has them."""
        names = ("keys", "values", "key_scales", "value_scales")
        parts: dict[str, Any] = dict(
            zip(names, zip(*layers, strict=True), strict=False)
        )
        return dataclasses.replace(self, length=length, **parts)

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int | None = None,
        dtype: Any = None,
        start: Array | None = None,
    ) -> "KVCache":
        """An empty cache for ``batch`` sequences.

        Args:
          config: the model.
          batch: B.
          capacity: S; ``max_seq_len`` where None.
          dtype: float32, bfloat16 or int8; the compute dtype where None.
          start: see the class; zeros where None.

        Raises:
          VaaniError: the dtype is another one.
        """
        try:
            name = jnp.dtype(dtype or config.dtype).name
        except TypeError:
            name = str(dtype)
        if name not in ("float32", "bfloat16", "int8"):
            raise VaaniError(f"a KV cache holds float32, bfloat16 or int8, not {name}")
        dtype = jnp.dtype(name)
        shape = (batch, capacity or config.max_seq_len, config.kv_heads)

        def zeros(shape: tuple[int, ...], dtype: Any) -> tuple[Array, ...]:
            # Distinct buffers, so that a donated cache is never donated twice.
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))

        coded = dtype == jnp.int8
        return cls(
            keys=zeros((*shape, config.head_dim), dtype),
            values=zeros((*shape, config.head_dim), dtype),
            length=jnp.zeros((), jnp.int32),
            start=jnp.zeros(batch, jnp.int32) if start is None else start,
            key_scales=zeros(shape, jnp.float32) if coded else (),
            value_scales=zeros(shape, jnp.float32) if coded else (),
        )


class Vaani(nn.Module):
    """A BitNet b1.58 language model."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        if c.vocab_size < 1:
            raise VaaniError("model.vocab_size is 0: set it, or take the tokenizer's")
        stored: Any = self.get_variable("params", "embedding")
        if not isinstance(stored, PackedRows):
            stored = self.param(
                "embedding",
                nn.initializers.normal(c.init_std),
                (c.vocab_size, c.dim),
                jnp.float32,
            )
        self.embedding = stored
        block: Any = TransformerBlock
        if c.remat:
            kept = (PRODUCT,) if c.remat_save == "products" else ()
            block = nn.remat(
                block,
                prevent_cse=not c.scan_layers,
                static_argnums=(7,),
                policy=jax.checkpoint_policies.save_only_these_names(*kept),
            )
        if c.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "quant": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, *[nn.broadcast] * 5),
                length=c.n_layers,
            )(c)
        else:
            self.layers = [block(c) for _ in range(c.n_layers)]
        self.final_norm = RMSNorm(c.norm_eps)
        self.packed_head: Any = self.get_variable("params", "head")
        masters = self.packed_head is None
        if c.ternary_head and c.quantize and c.tie_embeddings and masters:
            self.head_quantizer = TernaryQuantizer(c.threshold, c.spec)
        if not c.tie_embeddings:
            head = dataclasses.replace(c, quantize=c.quantize and c.ternary_head)
            self.lm_head = BitLinear(c.vocab_size, head, c.init_std)

    def __call__(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        *,
        train: bool = False,
        mix: Array | None = None,
        last: Array | None = None,
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: ids [B, T], integers.
          cache: tokens seen before these; the new ones are added.
          train: applies dropout (needs the random stream "dropout" if the rate is
            above 0) and updates tracked activation ranges.
          mix: lambda of gradual quantisation, a scalar; see `ternary_dot`.
          last: index along T of the only logits wanted, an int32 scalar: the product
            with the head is done for it alone.

        Returns:
          Logits [B, T, V] in float32, [B, 1, V] with ``last``; with a cache, the pair
          (logits, new cache). Where the cache's rows start later than these tokens,
          logits are finite and mean nothing.

        Raises:
          VaaniError: more tokens than the model or the cache can hold, as far as
            shapes and concrete lengths tell; for traced lengths see `KVCache`.
        """
        c = self.config
        length = tokens.shape[1]
        capacity = cache.capacity if cache is not None else c.max_seq_len
        seen = 0
        if cache is not None and not isinstance(cache.length, jax.core.Tracer):
            seen = int(cache.length)
        if seen + length > capacity:
            raise VaaniError(
                f"{seen + length} tokens do not fit the context of {capacity}"
            )
        start = None
        positions = jnp.arange(length, dtype=jnp.int32)
        table = rotary_angles(max(capacity, c.max_seq_len), c.head_dim, c.rope_theta)
        if cache is None:
            rotary = tuple(jnp.asarray(t[:length]) for t in table)
        else:
            start, positions = cache.start, cache.length + positions
            since = jnp.maximum(positions[None, :] - start[:, None], 0)
            rotary = tuple(jnp.take(t, since, axis=0, mode="clip") for t in table)

        keys = None
        if train and c.dropout > 0:
            keys = jax.random.split(self.make_rng("dropout"), c.n_layers + 1)
        if isinstance(self.embedding, PackedRows):
            x = take_rows(self.embedding, tokens).astype(c.dtype)
        else:
            x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype)
        x = dropout(x, c.dropout, None if keys is None else keys[-1])
        # Each device looks up its columns for all rows of its group; they exchange.
        x = constrain(x, "data", None, "fsdp")
        x = constrain(x, BATCH, None, None)
        filled: list[Any] = []
        if c.scan_layers:
            layer_caches = None
            if cache is not None:
                layer_caches = tuple(map(jnp.stack, zip(*cache.layers, strict=True)))
            layer_keys = None if keys is None else keys[:-1]
            x, stacked = self.layers(
                x, layer_caches, layer_keys, positions, rotary, mix, train, start
            )
            if cache is not None:
                filled = list(zip(*map(tuple, stacked), strict=True))
        else:
            for i, layer in enumerate(self.layers):
                layer_cache = None if cache is None else cache.layers[i]
                key = None if keys is None else keys[i]
                x, layer_cache = layer(
                    x, layer_cache, key, positions, rotary, mix, train, start
                )
                filled.append(layer_cache)
        if last is not None:
            x = jax.lax.dynamic_slice_in_dim(x, last, 1, axis=1)
        logits = self.head(self.final_norm(x), train=train, mix=mix)
        logits = constrain(logits, BATCH, None, "tensor")
        if cache is None:
            return logits
        end = cache.length + length
        logits = jnp.where(end <= capacity, logits, jnp.nan)
        return logits, cache.filled(filled, end)

    def head(self, x: Array, *, train: bool, mix: Array | None) -> Array:
        """Logits [B, T, V] in float32 of normalised states [B, T, D]."""
        c = self.config
        if not c.tie_embeddings:
            return self.lm_head(x, train=train, mix=mix).astype(jnp.float32)
        if self.packed_head is not None:
            return ternary_matmul(x, self.packed_head).astype(jnp.float32)
        if isinstance(self.embedding, PackedRows):
            return rows_matmul(x, self.embedding)
        if c.ternary_head and c.quantize:
            (logits,) = ternary_dot(
                x,
                (self.embedding.T,),
                (self.head_quantizer.tau(),),
                spec=c.spec,
                scales=(self.head_quantizer.stored(),),
                mix=mix,
            )
            return logits.astype(jnp.float32)
        # Cut along V first, which moves nothing; then only that part is gathered.
        embedding = constrain(self.embedding.astype(x.dtype), "tensor", "fsdp")
        return jnp.einsum(
            "BTD,VD->BTV",
            x,
            constrain(embedding, "tensor", None),
            preferred_element_type=jnp.float32,
        )


def stack_layers(tree: Tree, n_layers: int) -> Tree:
    """``layers_0 .. layers_<n-1>`` -> ``layers`` with a leading axis."""
    rest = {k: v for k, v in tree.items() if not k.startswith("layers_")}
    layers = [tree[f"layers_{i}"] for i in range(n_layers) if f"layers_{i}" in tree]
    if layers:
        rest["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return rest


def init_variables(config: ModelConfig, key: Array) -> tuple[Tree, Tree]:
    """Initial ``(params, quant)``; equal with and without `scan_layers`."""
    flat = Vaani(dataclasses.replace(config, scan_layers=False, remat=False))
    variables = flat.init(key, jnp.zeros((1, 1), jnp.int32))
    params, quant = variables["params"], variables.get("quant", {})
    if config.scan_layers:
        params = stack_layers(params, config.n_layers)
        quant = stack_layers(quant, config.n_layers)
    return params, quant


@dataclasses.dataclass(frozen=True)
class TernaryKernel:
    """A ternary kernel of a model: [in, out], or [layers, in, out] when stacked.

    Its scale is None where it is computed, not stored.
    """

    name: str
    kernel: Array
    threshold: Array
    scale: Array | None = None


def ternary_kernels(params: Tree, quant: Tree) -> list[TernaryKernel]:
    """Every ternary kernel with its threshold, in the order of the tree.

    Names are module paths, such as ``layers_0/attn/q_proj``; a tied ternary head is
    ``head``.
    """
    found = []

    def visit(path: tuple[str, ...], node: Tree, masters: Tree) -> None:
        if "weight_quantizer" in node:
            kept = node["weight_quantizer"]
            found.append(
                TernaryKernel(
                    "/".join(path),
                    masters["kernel"],
                    kept["threshold"],
                    kept.get("scale"),
                )
            )
            return
        for key, child in node.items():
            if key == "head_quantizer":
                kernel = masters["embedding"].T
                found.append(
                    TernaryKernel(
                        "head", kernel, child["threshold"], child.get("scale")
                    )
                )
            elif key in masters:
                visit((*path, key), child, masters[key])

    visit((), quant, params)
    return found


def with_settings(quant: Tree, thresholds: dict[str, Array], momentum: Array) -> Tree:
    """``quant`` with other thresholds, by kernel name, and activation momentum."""

    def visit(path: Any, leaf: Array) -> Array:
        *names, owner, key = (entry.key for entry in path)
        if owner == "weight_quantizer" and key == "threshold":
            return thresholds["/".join(names)]
        if owner == "head_quantizer" and key == "threshold":
            return thresholds["head"]
        return (
            momentum.astype(leaf.dtype) * jnp.ones_like(leaf)
            if key == "momentum"
            else leaf
        )

    return jax.tree_util.tree_map_with_path(visit, quant)


def ternary_codes(
    config: ModelConfig, params: Tree, quant: Tree
) -> dict[str, tuple[Array, Array]]:
    """Codes (int8, as the kernel) and scales (float32) of every ternary kernel.

    Stacked kernels keep their leading axis, in the scales too.
    """
    codes = {}
    for entry in ternary_kernels(params, quant):
        function = lambda w, tau, kept: ternarize(  # noqa: E731
            w, tau, config.spec, kept
        )
        if entry.kernel.ndim == 3:
            function = jax.vmap(function)
        t, scale = function(entry.kernel, entry.threshold, entry.scale)
        codes[entry.name] = (t.astype(jnp.int8), scale)
    return codes


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Counts of a model; bytes at 16 bits a parameter and with ternary ones at 2."""

    parameters: int
    ternary: int
    bytes_fp16: int
    bytes_2bit: int


def model_size(config: ModelConfig) -> ModelSize:
    """Counts parameters without computing any."""
    params, quant = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    total = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
    quantised = dataclasses.replace(config, quantize=True)
    params, quant = jax.eval_shape(lambda: init_variables(quantised, jax.random.key(0)))
    kernels = jax.eval_shape(
        lambda p, q: {e.name: e.kernel for e in ternary_kernels(p, q)}, params, quant
    )
    ternary = sum(int(np.prod(k.shape)) for k in kernels.values())
    channel = config.weight_granularity == "channel"
    scales = sum(
        int(np.prod(k.shape[:-2])) * (k.shape[-1] if channel else 1)
        for k in kernels.values()
    )
    return ModelSize(
        parameters=total,
        ternary=ternary,
        bytes_fp16=2 * total,
        bytes_2bit=2 * (total - ternary) + (ternary + 3) // 4 + 4 * scales,
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of a training step per token, as everyone counts them.

    PaLM (arXiv:2204.02311), appendix B: 6 for each parameter that is multiplied (2
    forward, 4 backward), and 12 D T per layer for the two products of attention, not
    halved for causality. The head counts once, tied or not; a look-up in the embedding,
    norms, quantisers and what rematerialisation computes again count nothing. So the
    utilisation of a chip (MFU) is tokens per second x this / the chip's peak.

    Args:
      config: the model, with its vocabulary; the twin counts the same.
      seq_len: T, tokens of a training sequence.
    """
    params, _ = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    multiplied = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == "kernel" or (name == "embedding" and config.tie_embeddings):
            multiplied += int(np.prod(leaf.shape))
    return 6 * multiplied + 12 * config.n_layers * config.dim * seq_len
