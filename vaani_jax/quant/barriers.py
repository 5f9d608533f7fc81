"""Roundings that a compiler may not leave out.

XLA fuses element-wise operations, and in doing so may round fewer times than written:
once for a product and the sum that it goes into, and not at all where a number is
stored in bfloat16 and used in float32. It may do so in one program and not in the next.
What has to be equal to the bit in both says so with these.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_jvp
def rounded(x: Array) -> Array:
    """``x``, in a way that keeps it from being fused into the sum that it goes into.

    Neither a barrier nor reduce_precision outlives compilation. This comparison does.
    Gradients pass it by: they need nothing of ``x``.
    """
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


rounded.defjvps(lambda tangent, result, x: tangent)


def to_dtype(x: Array, dtype: Any) -> Array:
    """``x`` in another dtype, and really rounded to it."""
    if jnp.dtype(dtype) == jnp.bfloat16 and x.dtype != jnp.bfloat16:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)
