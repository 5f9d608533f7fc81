"""Causal attention for training, and attention to a cache for decoding.

Accelerators get `jax.nn.dot_product_attention`. On a CPU, XLA spends more time around
its products than in them: `causal_attention` there keeps heads in front, so that every
product is a plain batch of matrices, and writes the backward pass out, which saves the
probabilities once. Both compute ``softmax(q k^T / sqrt(H)) v`` with the softmax in
float32; results differ by the order of float sums.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Implementation = Literal["auto", "library", "explicit"]


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    implementation: Implementation = "auto",
) -> Array:
    """Attention of each position to itself and those before it.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BTKH, v_BTKH: keys and values.
      implementation: "library" or "explicit"; "auto" takes the latter on CPUs.

    Returns:
      [B, T, N, H], in the dtype of the queries.
    """
    if implementation == "auto":
        implementation = "explicit" if jax.default_backend() == "cpu" else "library"
    if implementation == "library":
        return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True)
    batch, length, heads, size = q_BTNH.shape
    groups = heads // k_BTKH.shape[2]
    # Queries of one group share keys: they become further rows of one product.
    q = (q_BTNH * size**-0.5).transpose(0, 2, 1, 3)
    q = q.reshape(batch, heads // groups, groups * length, size)
    k = k_BTKH.transpose(0, 2, 1, 3)
    v = v_BTKH.transpose(0, 2, 1, 3)
    y = _explicit(q, k, v)
    return y.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


def _scores(a: Array, b: Array) -> Array:
    """[B, K, R, H] x [B, K, S, H] -> [B, K, R, S] in float32."""
    return jnp.einsum("BKRH,BKSH->BKRS", a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _explicit(q: Array, k: Array, v: Array) -> Array:
    return _explicit_fwd(q, k, v)[0]


def _explicit_fwd(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    length = k.shape[2]
    causal = np.tile(np.tri(length, dtype=bool), (q.shape[2] // length, 1))
    scores = jnp.where(causal[None, None], _scores(q, k), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights * (1.0 / jnp.sum(weights, axis=-1, keepdims=True))
    weights = weights.astype(v.dtype)
    y = jnp.einsum("BKRS,BKSH->BKRH", weights, v)
    return y, (q, k, v, y, weights)


def _explicit_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, weights = residuals
    dv = jnp.einsum("BKRS,BKRH->BKSH", weights, g)
    # d softmax: p * (dp - sum(p dp)), and sum(p dp) over keys is sum(y g) over H.
    rows = jnp.sum((y * g).astype(jnp.float32), axis=-1, keepdims=True)
    ds = (weights * (_scores(g, v) - rows)).astype(q.dtype)
    dq = jnp.einsum("BKRS,BKSH->BKRH", ds, k)
    dk = jnp.einsum("BKRS,BKRH->BKSH", ds, q)
    return dq, dk, dv


_explicit.defvjp(_explicit_fwd, _explicit_bwd)


def cached_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, positions: Array
) -> Array:
    """Attention of positions [T] to the cached positions up to themselves.

    Returns [B, T, N, H], in the dtype of the queries.
    """
    mask_TS = jnp.arange(k_BSKH.shape[1])[None, :] <= positions[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH.astype(q_BTNH.dtype),
        v_BSKH.astype(q_BTNH.dtype),
        mask=mask_TS[None, None],
    )
