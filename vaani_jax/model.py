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
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.layers import (
    BitLinear,
    ModelConfig,
    RMSNorm,
    TransformerBlock,
    dropout,
    rotary_angles,
)
from vaani_jax.quant import TernaryQuantizer, ternarize, ternary_dot

Array = jax.Array
Tree = Any

__all__ = ["KVCache", "ModelConfig", "Vaani", "init_variables"]


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in arrays of fixed size.

    Attributes:
      keys, values: one [B, S, K, H] per layer; positions from ``length`` on are unset.
      length: tokens seen, int32 scalar. Beyond the capacity S, logits are NaN: a
        traced length can't raise, and must not pass for an answer.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int | None = None,
        dtype: Any = None,
    ) -> "KVCache":
        """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""
        capacity = capacity or config.max_seq_len
        shape = (batch, capacity, config.kv_heads, config.head_dim)
        dtype = jnp.dtype(dtype or config.dtype)
        zeros = tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))
        # Distinct buffers, so that a donated cache is never donated twice.
        more = tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))
        return cls(zeros, more, jnp.zeros((), jnp.int32))


class Vaani(nn.Module):
    """A BitNet b1.58 language model."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        if c.vocab_size < 1:
            raise VaaniError("model.vocab_size is 0: set it, or take the tokenizer's")
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(c.init_std),
            (c.vocab_size, c.dim),
            jnp.float32,
        )
        block: Any = TransformerBlock
        if c.remat:
            block = nn.remat(block, prevent_cse=not c.scan_layers, static_argnums=(7,))
        if c.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "quant": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, *[nn.broadcast] * 4),
                length=c.n_layers,
            )(c)
        else:
            self.layers = [block(c) for _ in range(c.n_layers)]
        self.final_norm = RMSNorm(c.norm_eps)
        if c.ternary_head and c.quantize and c.tie_embeddings:
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
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: ids [B, T], integers.
          cache: tokens seen before these; the new ones are added.
          train: applies dropout (needs the random stream "dropout" if the rate is
            above 0) and updates tracked activation ranges.
          mix: lambda of gradual quantisation, a scalar; see `ternary_dot`.

        Returns:
          Logits [B, T, V] in float32; with a cache, the pair (logits, new cache).

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
        start = cache.length if cache is not None else jnp.zeros((), jnp.int32)
        positions = start + jnp.arange(length, dtype=jnp.int32)
        table = rotary_angles(max(capacity, c.max_seq_len), c.head_dim, c.rope_theta)
        if cache is None:
            rotary = tuple(jnp.asarray(t[:length]) for t in table)
        else:
            rotary = tuple(jnp.take(t, positions, axis=0, mode="clip") for t in table)

        keys = None
        if train and c.dropout > 0:
            keys = jax.random.split(self.make_rng("dropout"), c.n_layers + 1)
        x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype)
        x = dropout(x, c.dropout, None if keys is None else keys[-1])
        pairs: list[Any] = []
        if c.scan_layers:
            layer_caches = None
            if cache is not None:
                layer_caches = (jnp.stack(cache.keys), jnp.stack(cache.values))
            layer_keys = None if keys is None else keys[:-1]
            x, stacked = self.layers(
                x, layer_caches, layer_keys, positions, rotary, mix, train
            )
            if cache is not None:
                pairs = list(zip(*map(tuple, stacked), strict=True))
        else:
            for i, layer in enumerate(self.layers):
                pair = None if cache is None else (cache.keys[i], cache.values[i])
                key = None if keys is None else keys[i]
                x, pair = layer(x, pair, key, positions, rotary, mix, train)
                pairs.append(pair)
        logits = self.head(self.final_norm(x), train=train, mix=mix)
        if cache is None:
            return logits
        end = cache.length + length
        logits = jnp.where(end <= capacity, logits, jnp.nan)
        return logits, KVCache(
            tuple(k for k, _ in pairs), tuple(v for _, v in pairs), end
        )

    def head(self, x: Array, *, train: bool, mix: Array | None) -> Array:
        """Logits [B, T, V] in float32 of normalised states [B, T, D]."""
        c = self.config
        if not c.tie_embeddings:
            return self.lm_head(x, train=train, mix=mix).astype(jnp.float32)
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
        return jnp.einsum(
            "BTD,VD->BTV",
            x,
            self.embedding.astype(x.dtype),
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
