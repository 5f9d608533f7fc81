"""Sums that are the same to the bit in any order."""

import math

import jax
import jax.numpy as jnp

from vaani_jax.devices.mesh import AXES, shards

Array = jax.Array


_DIGIT = 11  # bits: 2^20 digits sum to less than 2^31


_FRACTION = 2 * _DIGIT


_FLOAT32_BIAS = 127


_FLOAT32_MANTISSA = 23  # bits


def exact_sum(x: Array, axis: int | None = None) -> Array:
    """A sum that is the same to the bit in any order, so on any mesh.

    A float32 sum depends on its order in the last bits; a scale that did would move
    every activation after it, and tip some of their roundings. So the terms are rounded
    to 22 bits below the power of two above the largest, and summed as integers, in two
    digits of 11 bits. Relative to the sum, the error of that rounding is about
    ``2^-24 max / (mean sqrt(n))``, less than what float32 sums err by.

    Args:
      x: terms [K, N], float32, none negative; K and N below a million.
      axis: None to sum all, 0 to sum each column.

    Returns:
      float32 [1, 1], or [1, N]; NaN where a term is infinite or NaN.
    """
    # Bits of floats that aren't negative are in their order, with NaN above all.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    top = jnp.max(bits, axis=axis, keepdims=True)
    # Every term is below 2^(exponent - bias + 1); below 2^-105, all become zero.
    exponent = jnp.maximum(top >> _FLOAT32_MANTISSA, _FLOAT32_BIAS - 105)
    shift = _FLOAT32_BIAS - 1 + _FRACTION - exponent
    # The addition rounds the term to an integer, in the low bits of the sum.
    rounded = x * _power_of_two(shift) + 2.0**_FLOAT32_MANTISSA
    terms = jax.lax.bitcast_convert_type(rounded, jnp.int32)
    terms = terms & (2**_FLOAT32_MANTISSA - 1)
    # Columns first, which vectorises; in as many parts as devices, so that what they
    # tell each other is a number, not a row.
    parts = math.gcd(x.shape[0], shards(AXES)) if axis is None else 1
    terms = terms.reshape(parts, -1, x.shape[1])
    high = jnp.sum(terms >> _DIGIT, axis=1)
    low = jnp.sum(terms & (2**_DIGIT - 1), axis=1)
    high, low = high + (low >> _DIGIT), low & (2**_DIGIT - 1)
    digits = jnp.stack([low, *_digits(high)])
    if axis is None:
        digits = jnp.sum(digits, axis=(1, 2), keepdims=True)
    total = jnp.zeros(digits.shape[1:], jnp.float32)
    for digit in digits[::-1]:
        total = total * 2.0**_DIGIT + digit.astype(jnp.float32)
    total = total * _power_of_two(-shift)
    infinite = (2 * _FLOAT32_BIAS + 1) << _FLOAT32_MANTISSA
    return jnp.where(top < infinite, total, jnp.nan)


@jax.custom_vjp
def exact_mean(x: Array) -> Array:
    """The mean over the last axis of ``x`` [..., D], float32: [..., 1].

    The same to the bit whatever other rows there are; see `exact_sum`.
    """
    columns = x.reshape(-1, x.shape[-1]).T
    above, below = (exact_sum(jnp.maximum(part, 0), 0) for part in (columns, -columns))
    return ((above - below) * (1.0 / x.shape[-1])).reshape(*x.shape[:-1], 1)


def _exact_mean_fwd(x: Array) -> tuple[Array, Array]:
    return exact_mean(x), jnp.zeros((0, x.shape[-1]))


def _exact_mean_bwd(shape: Array, g: Array) -> tuple[Array]:
    width = shape.shape[-1]
    return (jnp.broadcast_to(g * (1.0 / width), (*g.shape[:-1], width)),)


exact_mean.defvjp(_exact_mean_fwd, _exact_mean_bwd)


def _digits(x: Array) -> list[Array]:
    """Of integers [...] below 2^31, the lowest first."""
    mask = 2**_DIGIT - 1
    return [(x >> _DIGIT * place) & mask for place in range(3)]


def _power_of_two(exponent: Array) -> Array:
    """2^exponent, float32, of int32 exponents from -126 to 127."""
    bits = (exponent + _FLOAT32_BIAS) << _FLOAT32_MANTISSA
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
