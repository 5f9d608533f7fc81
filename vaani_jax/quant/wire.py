"""What crosses the wire of a kernel that is cut over devices: codes, not floats."""

from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.devices.mesh import constrain_weights, shards
from vaani_jax.quant.packed import pack_neighbors, unpack_neighbors
from vaani_jax.quant.spec import Split, Wire

Array = jax.Array


# The axes of a kernel's dimensions, as stored and where it is multiplied.
STORED = {"out": ("fsdp", "tensor"), "in": ("tensor", "fsdp")}


_MULTIPLIED = {"out": (None, "tensor"), "in": ("tensor", None)}


_PACKED = {"out": 1, "in": 0}  # the dimension along which codes share a byte


def send(t: Array, dtype: Any, wire: Wire, split: Split) -> Array:
    """Operands [K, N] as they cross the wire: each device codes its own part.

    2-bit codes share a byte with their neighbors along the dimension that ``fsdp``
    leaves whole: [K, N / 4] or, split "in", [K / 4, N].
    Where ``tensor`` cuts it so that four don't stay together, codes have 8 bits.
    """
    if shards("fsdp") == 1 or wire == "float":
        return t.astype(dtype)
    axis = _PACKED[split]
    if wire == "int8" or t.shape[axis] % (4 * shards("tensor")):
        return t.astype(jnp.int8)
    return pack_neighbors(t, axis)


def gather(sent: Array, split: Split) -> Array:
    """What `send` made of operands, whole along ``fsdp``."""
    if shards("fsdp") == 1:
        return sent
    sent = constrain_weights(sent, *STORED[split])
    return constrain_weights(sent, *_MULTIPLIED[split])


def opened(sent: Array, dtype: Any, split: Split) -> Array:
    """What `send` made of operands, as [K, N] in ``dtype``."""
    if sent.dtype == jnp.uint8:
        sent = unpack_neighbors(sent, _PACKED[split])
    return sent.astype(dtype)


def receive(sent: Array, dtype: Any, split: Split) -> Array:
    """What `send` made of operands, whole along ``fsdp``, as [K, N] in ``dtype``."""
    return opened(gather(sent, split), dtype, split)


def whole_kernel(w: Array, dtype: Any, split: Split) -> Array:
    """A kernel [K, N] in ``dtype``, whole along ``fsdp``: for plain products."""
    return receive(send(w, dtype, "float", split), dtype, split)
