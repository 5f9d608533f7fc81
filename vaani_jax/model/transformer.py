"""The language model, its initial variables, and its layers stacked or unrolled."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.devices.apart import mapped_axes
from vaani_jax.devices.mesh import BATCH, constrain, constrain_weights
from vaani_jax.errors import VaaniError
from vaani_jax.kernels import rows_matmul, ternary_matmul
from vaani_jax.kernels.floats import float_matmul
from vaani_jax.model.block import TransformerBlock, dropout
from vaani_jax.model.cache import KVCache
from vaani_jax.model.config import Architecture, Execution, Quantization, ternary_spec
from vaani_jax.model.linear import PRODUCT, BitLinear, unrounded_product
from vaani_jax.model.norm import NORMS
from vaani_jax.model.rotary import rotary_angles
from vaani_jax.quant.barriers import to_dtype
from vaani_jax.quant.packed import (
    PackedRows,
    PackedTernary,
    dequantized,
    take_columns,
    take_rows,
)
from vaani_jax.quant.product import ternary_dot
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.straight_through import straight_through
from vaani_jax.quant.weights import TernaryQuantizer, along_inputs
from vaani_jax.quant.wire import receive, whole_kernel

Array = jax.Array
Tree = Any


class Vaani(nn.Module):
    """A BitNet b1.58 language model."""

    architecture: Architecture = Architecture()
    quantization: Quantization = Quantization()
    execution: Execution = Execution()

    def changed(self, **keys: Any) -> "Vaani":
        """The model with other keys, in whichever of its three parts they are.

        ``Vaani().changed(vocab_size=256, dim=64, quantize=False)``, for example.

        Raises VaaniError for a key that no part has, or a value that does not fit.
        """
        parts = {}
        for name in ("architecture", "quantization", "execution"):
            part: Any = getattr(self, name)
            fields = {field.name for field in dataclasses.fields(part)}
            mine = {key: keys.pop(key) for key in [*keys] if key in fields}
            parts[name] = dataclasses.replace(part, **mine)
        if keys:
            raise VaaniError(f"a model has no key {min(keys)}")
        return self.clone(**parts)

    @property
    def spec(self) -> TernarySpec:
        """How its ternary products quantize."""
        return ternary_spec(self.quantization, self.execution)

    def setup(self) -> None:
        a, q, e = self.architecture, self.quantization, self.execution
        if a.vocab_size < 1:
            raise VaaniError("model.vocab_size is 0: set it, or take the tokenizer's")
        q.check_fits(a)
        stored: Any = self.get_variable("params", "embedding")
        if not isinstance(stored, PackedRows | PackedTernary):
            stored = self.param(
                "embedding",
                nn.initializers.normal(a.init_std),
                (a.vocab_size, a.dim),
                jnp.float32,
            )
        self.embedding = stored
        block: Any = TransformerBlock
        if e.remat:
            kept = (PRODUCT,) if e.remat_save == "products" else ()
            block = nn.remat(
                block,
                prevent_cse=not e.scan_layers,
                static_argnums=(7,),
                policy=jax.checkpoint_policies.save_only_these_names(*kept),
            )
        if e.scan_layers:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "quant": 0, "held": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, *[nn.broadcast] * 5),
                length=a.n_layers,
            )(a, q, e)
        else:
            self.layers = [block(a, q, e) for _ in range(a.n_layers)]
        self.final_norm = NORMS[a.norm](a.norm_eps)
        self.packed_head: Any = self.get_variable("params", "head")
        packed = isinstance(stored, PackedTernary) or self.packed_head is not None
        rounds = q.quantize and not packed
        self.rounds_embedding = rounds and q.ternary_embedding
        self.rounds_head = rounds and q.ternary_head and a.tie_embeddings
        if self.rounds_embedding:
            self.rounds_head = a.tie_embeddings  # one matrix, one quantizer
            self.embedding_quantizer = TernaryQuantizer(q.threshold, self.spec)
            self.held_embedding: Any = self.get_variable("held", "embedding")
        elif self.rounds_head:
            self.head_quantizer = TernaryQuantizer(q.threshold, self.spec)
            self.held_head: Any = self.get_variable("held", "head")
        if not a.tie_embeddings:
            head = dataclasses.replace(q, quantize=q.quantize and q.ternary_head)
            self.lm_head = BitLinear(a.vocab_size, head, e, a.init_std)

    def __call__(
        self,
        tokens: Array,
        cache: KVCache | None = None,
        *,
        train: bool = False,
        mix: Array | None = None,
        last: Array | None = None,
        logits: bool = True,
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: ids [B, T], integers.
          cache: tokens seen before these; the new ones are added.
          train: applies dropout (needs the random stream "dropout" if the rate is
            above 0) and updates tracked activation ranges.
          mix: lambda of gradual quantization, a scalar; see `ternary_dot`.
          last: index along T of the only logits wanted, an int32 scalar: the product
            with the head is done for it alone.
          logits: whether to compute them; without, and without a cache, the result is
            what `head` takes: normalized states [B, T, D].

        Returns:
          Logits [B, T, V] in float32, [B, 1, V] with ``last``; with a cache, the pair
          (logits, new cache). Where the cache's rows start later than these tokens,
          logits are finite and mean nothing.

        Raises:
          VaaniError: more tokens than the model or the cache can hold, as far as
            shapes and concrete lengths tell; for traced lengths see `KVCache`.
        """
        a, dtype = self.architecture, self.quantization.dtype
        length = tokens.shape[1]
        capacity = cache.capacity if cache is not None else a.max_seq_len
        seen = 0
        if cache is not None and not isinstance(cache.length, jax.core.Tracer):
            seen = int(cache.length)
        if seen + length > capacity:
            raise VaaniError(
                f"{seen + length} tokens do not fit the context of {capacity}"
            )
        start = None
        positions = jnp.arange(length, dtype=jnp.int32)
        table: Any = self.get_variable("angles", "table")
        if table is None:
            table = angles_for(a, capacity)
        if cache is None:
            rotary = tuple(jnp.asarray(t[:length]) for t in table)
        else:
            start, positions = cache.start, cache.length + positions
            since = jnp.maximum(positions[None, :] - start[:, None], 0)
            rotary = tuple(jnp.take(t, since, axis=0, mode="clip") for t in table)

        keys = None
        if train and a.dropout > 0:
            keys = jax.random.split(self.make_rng("dropout"), a.n_layers + 1)
        if isinstance(self.embedding, PackedRows):
            x = to_dtype(take_rows(self.embedding, tokens), dtype)
        elif isinstance(self.embedding, PackedTernary):
            x = to_dtype(take_columns(self.embedding, tokens), dtype)
        else:
            # Each device looks up its columns for all rows of its group; where rows are
            # apart, all columns for its own.
            matrix, rows = self._looked_up(mix), constrain(tokens, "data", None)
            if "fsdp" in mapped_axes():
                matrix = constrain_weights(matrix, None, None)
            x = to_dtype(jnp.take(matrix, rows, axis=0), dtype)
        x = dropout(x, a.dropout, None if keys is None else keys[-1])
        # Then those of a group exchange columns for rows.
        x = constrain(x, "data", None, "fsdp")
        x = constrain(x, BATCH, None, None)
        filled: list[Any] = []
        if self.execution.scan_layers:
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
        x = self.final_norm(x)
        if not logits:
            return x
        found = self.head(x, train=train, mix=mix)
        found = constrain(found, BATCH, None, "tensor")
        if cache is None:
            return found
        end = cache.length + length
        found = jnp.where(end <= capacity, found, jnp.nan)
        return found, cache.filled(filled, end)

    def head(self, x: Array, *, train: bool = False, mix: Array | None = None) -> Array:
        """Logits [B, T, V] in float32 of normalized states [B, T, D]."""
        q = self.quantization
        if not self.architecture.tie_embeddings:
            kernel: Any = self.lm_head.kernel(x.shape[-1])
            if isinstance(kernel, PackedRows):
                return rows_matmul(x, kernel)
            if isinstance(kernel, PackedTernary) or self.lm_head.quantization.quantize:
                return self.lm_head(x, train=train, mix=mix).astype(jnp.float32)
            return float_matmul(x, whole_kernel(kernel, x.dtype, "out"), True)
        packed = self.packed_head
        if packed is None and isinstance(self.embedding, PackedTernary):
            packed = self.embedding
        if packed is not None and q.activation_tracking == "none":
            return unrounded_product(x, dequantized(packed)).astype(jnp.float32)
        if packed is not None:
            logits: Array = ternary_matmul(
                x, packed, activation_group=q.activation_pieces
            )
            return logits.astype(jnp.float32)
        if isinstance(self.embedding, PackedRows):
            return rows_matmul(x, self.embedding)
        if self.rounds_head:
            return self._ternary_head(x, mix).astype(jnp.float32)
        # Cut along V first, which moves nothing; then only that part is gathered.
        embedding = self.embedding.astype(x.dtype)
        embedding = constrain_weights(embedding, "tensor", "fsdp")
        return float_matmul(x, constrain_weights(embedding, "tensor", None))

    def _looked_up(self, mix: Array | None) -> Array:
        """The embedding [V, D] whose rows are taken, gradients straight through."""
        if not self.rounds_embedding:
            return self.embedding
        w = self.embedding.T
        if self.held_embedding is None:
            found = self.embedding_quantizer(w)
        else:
            ready = self.held_embedding
            codes = receive(ready.codes, jnp.float32, "out")
            found = straight_through(codes * along_inputs(ready.scale, len(w)), w)
        if mix is not None:
            found = w + mix.astype(jnp.float32) * (found - w)
        return found.T

    def _ternary_head(self, x: Array, mix: Array | None) -> Array:
        """Logits of a ternary head that is tied, in the dtype of ``x``."""
        w = self.embedding.T
        quantizer, held = (
            (self.embedding_quantizer, self.held_embedding)
            if self.rounds_embedding
            else (self.head_quantizer, self.held_head)
        )
        if self.quantization.activation_tracking == "none":
            found = quantizer(w)
            if mix is not None:
                found = w + mix.astype(jnp.float32) * (found - w)
            return unrounded_product(x, found)
        (logits,) = ternary_dot(
            x,
            (w,),
            (quantizer.tau(),),
            spec=self.spec,
            scales=(quantizer.stored(*w.shape),),
            held=(held,),
            mix=mix,
        )
        return logits


@functools.lru_cache(maxsize=2)  # a second for 131,072 positions
def angles_for(a: Architecture, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotary angles of all positions that a cache of ``capacity`` slots may have.

    Not of all that the context has: a shorter table is the beginning of a longer one.
    """
    rows = min(a.max_seq_len, -(-capacity // 256) * 256)
    return rotary_angles(max(capacity, rows), a.rotary)


LARGE_TABLE = 2**18  # bytes


def with_angles(model: Vaani, variables: Tree, capacity: int) -> Tree:
    """Variables with the table of rotary angles, where it is large.

    Else every program that is compiled with them would hold a table of its own.
    """
    table = angles_for(model.architecture, capacity)
    if sum(part.nbytes for part in table) <= LARGE_TABLE:
        return variables
    return {**variables, "angles": {"table": tuple(map(jnp.asarray, table))}}


def stack_layers(tree: Tree, n_layers: int) -> Tree:
    """``layers_0 .. layers_<n-1>`` -> ``layers`` with a leading axis."""
    rest = {k: v for k, v in tree.items() if not k.startswith("layers_")}
    layers = [tree[f"layers_{i}"] for i in range(n_layers) if f"layers_{i}" in tree]
    if layers:
        rest["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return rest


def init_variables(model: Vaani, key: Array) -> Tree:
    """Initial ``params`` and ``quant``; equal with and without `scan_layers`."""
    flat = model.changed(scan_layers=False, remat=False)
    found = flat.init(key, jnp.zeros((1, 1), jnp.int32))
    variables = {"params": found["params"], "quant": found.get("quant", {})}
    if model.execution.scan_layers:
        n_layers = model.architecture.n_layers
        variables = {k: stack_layers(v, n_layers) for k, v in variables.items()}
    return variables


def unrolled(model: Vaani, variables: Tree) -> tuple[Vaani, Tree]:
    """The same model with its layers unrolled, which decodes faster on a CPU."""
    if not model.execution.scan_layers:
        return model, variables

    def unstack(tree: Any) -> Any:
        if "layers" not in tree:
            return tree
        rest = {k: v for k, v in tree.items() if k != "layers"}
        for i in range(model.architecture.n_layers):
            rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], tree["layers"])
        return rest

    variables = {name: unstack(tree) for name, tree in variables.items()}
    return model.changed(scan_layers=False), variables
