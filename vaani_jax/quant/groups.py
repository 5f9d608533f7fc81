"""Products whose scales go by groups of inputs, in one order of float32 sums.

Weights may have a scale for every G inputs of an output, ``s [K / G, N]``, and
activations one for every A inputs of a token, ``d [M, K / A]``; one of G and A divides
the other. Over a piece of ``min(G, A)`` inputs all scales are the same, and

    S_p[m, n] = sum over the piece of  q[m, k] T[k, n]

is an integer. The pieces are summed in float32, in their order, from 0, with a rounding
after each product and each sum: first those of the larger group, each times the scale
of the smaller, then the groups, each sum times the scale of the larger:

    A >= G:   y = sum_a (sum_{g in a} S_g s_g) d_a
    A <  G:   y = sum_g (sum_{p in g} S_p d_p) s_g

An activation scale per token is A = K, a weight scale per tensor or channel G = K;
where activations have a group of all K beside such a scale, theirs comes first. So the
product is the same to the bit here, in every kernel, and on every machine.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.quant.barriers import rounded

Array = jax.Array

UNROLLED = 8  # outer groups up to which they are traced one by one


def check_groups(k: int, group: int, activation_group: int) -> None:
    """Raises VaaniError for groups that don't fit K inputs, or each other."""
    if k % group or k % activation_group:
        raise VaaniError(
            f"{k} inputs are no multiple of groups of {group} weights and of"
            f" {activation_group} activations: choose quantization.weight_group and"
            " quantization.activation_group that divide them"
        )
    if max(group, activation_group) % min(group, activation_group):
        raise VaaniError(
            f"groups of {group} weights and of {activation_group} activations do not"
            " fit each other: one must be a multiple of the other"
        )


def grouped_product(q: Array, t: Array, weight: Array, token: Array) -> Array:
    """The product of integers, times their scales.

    Args:
      q: integers of activations [M, K], in a dtype that holds them.
      t: ternary weights [K, N] in the same dtype.
      weight: their scales s, [], [N] or [K / G, N], float32.
      token: the scales d of activations, [M, K / A] float32.

    Returns:
      [M, N] float32.
    """
    m, k = q.shape
    n = t.shape[1]
    by_groups = weight.ndim == 2
    weight = weight if by_groups else jnp.broadcast_to(weight, (1, n))
    group, span = k // weight.shape[0], k // token.shape[1]
    check_groups(k, group, span)
    fine, coarse = min(group, span), max(group, span)
    weights = weight[:, None, :]  # [K / G, 1, N]
    tokens = token.T[:, :, None]  # [K / A, M, 1]
    weights_first = span > group or (span == group and by_groups)
    inner, outer = (weights, tokens) if weights_first else (tokens, weights)
    inner = inner.reshape(k // coarse, coarse // fine, *inner.shape[1:])
    integer = q.dtype == jnp.int8

    def one(total: Array, parts: Any) -> tuple[Array, None]:
        """Adds an outer group: its q [M, coarse], t [coarse, N] and scales."""
        q, t, small, large = parts
        found = jnp.zeros((m, n), jnp.float32)
        for i in range(coarse // fine):
            sums = jnp.dot(
                q[:, i * fine : (i + 1) * fine],
                t[i * fine : (i + 1) * fine],
                precision="highest",
                preferred_element_type=jnp.int32 if integer else jnp.float32,
            )
            found = found + rounded(sums.astype(jnp.float32) * small[i])
        return total + rounded(found * large), None

    parts = (
        q.reshape(m, k // coarse, coarse).swapaxes(0, 1),
        t.reshape(k // coarse, coarse, n),
        inner,
        outer,
    )
    total = jnp.zeros((m, n), jnp.float32)
    if k // coarse > UNROLLED:
        return jax.lax.scan(one, total, parts)[0]
    for i in range(k // coarse):
        total, _ = one(total, jax.tree.map(lambda x, i=i: x[i], parts))
    return total
