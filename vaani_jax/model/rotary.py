"""Rotary position embedding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.quant.barriers import rounded, to_dtype

Array = jax.Array


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
    rotated = jnp.concatenate(
        [
            rounded(low * cos) - rounded(high * sin),
            rounded(high * cos) + rounded(low * sin),
        ],
        axis=-1,
    )
    return to_dtype(rotated, x.dtype)
