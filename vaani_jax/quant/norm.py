"""Root-mean-square norm (arXiv:1910.07467), with its gradient written out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis, in float32.

    Args:
      x: [..., D].
      scale: [D].
      epsilon: added to the mean square.

    Returns:
      Same shape and dtype as ``x``. The gradient is written out, so that the
      normalized values are computed once, not in every fusion that needs them.
    """
    return _rms_norm_fwd(x, scale, epsilon)[0]


def _rms_norm_fwd(x: Array, scale: Array, epsilon: float) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    y = wide * inverse * _along_last(scale, x.ndim)
    return y.astype(x.dtype), (x, scale, inverse)


def _rms_norm_bwd(epsilon: float, residuals: Any, g: Array) -> tuple[Array, Array]:
    del epsilon
    x, scale, inverse = residuals
    wide, g = x.astype(jnp.float32), g.astype(jnp.float32)
    normed = wide * inverse
    dscale = jnp.sum(g * normed, axis=tuple(range(x.ndim - 1)))
    u = g * _along_last(scale, x.ndim)
    mean = jnp.mean(u * normed, axis=-1, keepdims=True)
    return ((u - normed * mean) * inverse).astype(x.dtype), dscale


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def _along_last(scale: Array, ndim: int) -> Array:
    return scale.reshape((1,) * (ndim - 1) + (-1,))
