"""The KV cache: keys and values of the tokens seen so far."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.model.codes import blocks_of, halves_of
from vaani_jax.model.config import Architecture

Array = jax.Array

DTYPES = ("float32", "bfloat16", "int8", "int4")
PARTS = ("keys", "values", "key_scales", "value_scales", "key_centers")


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, in arrays of fixed size.

    A slot is a place along S. All rows fill the same slots; a row that is shorter than
    others begins later, and what lies in the slots before its start is padding, which
    nothing sees. Positions, for the rotary embedding, count from the start of a row.

    Attributes:
      keys, values: one [B, S, K, H] per layer, float32, bfloat16, or int8 codes; in 4
        bits [B, S, K, 16 ceil(H / 32)] uint8, two codes a byte. Slots from ``length``
        on are unset.
      length: slots filled, int32 scalar. Beyond the capacity S, logits are NaN: a
        traced length can't raise, and must not pass for an answer.
      start: first slot of each row, [B] int32.
      key_scales, value_scales: where keys and values are codes, one [B, S, K] float32
        per layer: ``codes * scale``, a scale for each token and head; else empty.
      key_centers: what keys in 4 bits are coded around, one [B, ceil(S / 64), K, H]
        float32 per layer, a center for each 64 tokens of a row; else empty. `codes.py`
        says where they come from.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array
    start: Array
    key_scales: tuple[Array, ...] = ()
    value_scales: tuple[Array, ...] = ()
    key_centers: tuple[Array, ...] = ()

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; almost all of them keys and values."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    @property
    def layers(self) -> list[tuple[Array, ...]]:
        """What each layer reads: keys and values, their scales if any, and centers."""
        parts = (getattr(self, name) for name in PARTS)
        return list(zip(*filter(None, parts), strict=True))

    def filled(self, layers: Sequence[tuple[Array, ...]], length: Array) -> "KVCache":
        """This cache with other contents, given as `layers` has them."""
        parts: dict[str, Any] = dict(
            zip(PARTS, zip(*layers, strict=True), strict=False)
        )
        return dataclasses.replace(self, length=length, **parts)

    @classmethod
    def create(
        cls,
        architecture: Architecture,
        batch: int,
        capacity: int | None = None,
        dtype: Any = "float32",
        start: Array | None = None,
    ) -> "KVCache":
        """An empty cache for ``batch`` sequences.

        Args:
          architecture: of the model.
          batch: B.
          capacity: S; ``max_seq_len`` where None.
          dtype: float32, bfloat16, int8 or int4.
          start: see the class; zeros where None.

        Raises:
          VaaniError: the dtype is another one.
        """
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = str(dtype)
        if name not in DTYPES:
            *others, last = DTYPES
            listed = f"{', '.join(others)} or {last}"
            raise VaaniError(f"a KV cache holds {listed}, not {name}")
        slots, heads = capacity or architecture.max_seq_len, architecture.kv_heads
        size = width = architecture.head_size
        dtype = jnp.dtype(name)
        if name == "int4":
            dtype, width = jnp.dtype("uint8"), halves_of(size)
        shape = (batch, slots, heads)

        def zeros(shape: tuple[int, ...], dtype: Any) -> tuple[Array, ...]:
            # Distinct buffers, so that a donated cache is never donated twice.
            return tuple(jnp.zeros(shape, dtype) for _ in range(architecture.n_layers))

        coded = name in ("int8", "int4")
        centers = (batch, blocks_of(slots), heads, size)
        return cls(
            keys=zeros((*shape, width), dtype),
            values=zeros((*shape, width), dtype),
            length=jnp.zeros((), jnp.int32),
            start=jnp.zeros(batch, jnp.int32) if start is None else start,
            key_scales=zeros(shape, jnp.float32) if coded else (),
            value_scales=zeros(shape, jnp.float32) if coded else (),
            key_centers=zeros(centers, jnp.float32) if name == "int4" else (),
        )
