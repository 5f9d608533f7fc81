"""What crosses the wire of a kernel that is cut over devices: codes, not floats."""

from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.devices.mesh import constrain, shards
from vaani_jax.quant.spec import Split, Wire

Array = jax.Array


# The axes of a kernel's dimensions, as stored and where it is multiplied.
STORED = {"out": ("fsdp", "tensor"), "in": ("tensor", "fsdp")}


_MULTIPLIED = {"out": (None, "tensor"), "in": ("tensor", None)}


_PACKED = {"out": 1, "in": 0}  # the dimension along which codes share a byte


def _shifts(axis: int) -> Array:
    """Bits to shift the four codes of a byte by, along ``axis + 1`` of three."""
    shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)
    return shift.reshape(4, 1) if axis == 0 else shift


def send(t: Array, dtype: Any, wire: Wire, split: Split) -> Array:
    """Operands [K, N] as they cross the wire: each device codes its own part.

    2-bit codes are ``t + 1``, four neighbours in a byte, the lowest bits first, along
    the dimension that ``fsdp`` leaves whole: [K, N / 4] or, split "in", [K / 4, N].
    Where ``tensor`` cuts it so that four don't stay together, codes have 8 bits.
    """
    if shards("fsdp") == 1 or wire == "float":
        return t.astype(dtype)
    axis = _PACKED[split]
    if wire == "int8" or t.shape[axis] % (4 * shards("tensor")):
        return t.astype(jnp.int8)
    codes = (t + 1).astype(jnp.uint8)
    codes = codes.reshape(*t.shape[:axis], -1, 4, *t.shape[axis + 1 :])
    return jnp.sum(codes << _shifts(axis), axis=axis + 1, dtype=jnp.uint8)


def receive(sent: Array, dtype: Any, split: Split) -> Array:
    """What `send` made of operands, whole along ``fsdp``, as [K, N] in ``dtype``."""
    if shards("fsdp") == 1:
        return sent
    sent = constrain(sent, *STORED[split])
    sent = constrain(sent, *_MULTIPLIED[split])
    if sent.dtype != jnp.uint8:
        return sent.astype(dtype)
    axis = _PACKED[split]
    codes = (jnp.expand_dims(sent, axis + 1) >> _shifts(axis)) & 3
    shape = list(sent.shape)
    shape[axis] *= 4
    return (codes.astype(jnp.int8) - 1).reshape(shape).astype(dtype)


def whole_kernel(w: Array, dtype: Any, split: Split) -> Array:
    """A kernel [K, N] in ``dtype``, whole along ``fsdp``: for plain products."""
    return receive(send(w, dtype, "float", split), dtype, split)
