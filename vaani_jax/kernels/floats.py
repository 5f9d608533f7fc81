"""What of a model is summed in floats: norms, attention, a full-precision head.

Integer products are exact, so any way to compute them gives the same bits. Sums of
floats aren't: how a compiler cuts them depends on shapes, on the processor and on
what stands beside them. So on a CPU with native kernels the forward pass of training
and all of serving call one implementation, whose order is written out (`kernels.cc`)
and depends neither on other rows nor on padding, nor on threads. What you train then
is what you serve, to the bit.

Accelerators, meshes of several devices and machines without the native kernels get
what XLA makes of the formulas: equal up to the order of float sums.

Between them stand element-wise operations, which `quant/barriers.py` keeps equal.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.kernels import cpu
from vaani_jax.kernels.choice import backend
from vaani_jax.quant.barriers import rounded, to_dtype

Array = jax.Array

# Part of what JAX looks a traced function up by: a plan's is no other's.
_compiled = jax.make_user_context(False)


def compiled_floats() -> Any:
    """A context that traces everything as operations of XLA, which a plan can count."""
    return _compiled(True)


def native() -> bool:
    """Whether what is traced now calls native float parts."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1
    return whole and not _compiled.value and backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis, in float32.

    Root-mean-square norm (arXiv:1910.07467).

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
    if native():
        rows = wide.reshape(-1, x.shape[-1])
        y, factors = cpu.rms_norm(rows, scale, epsilon)
        inverse = factors.reshape(*x.shape[:-1], 1)
        y = y.reshape(x.shape)
    else:
        inverse = jax.lax.rsqrt(
            rounded(jnp.mean(wide * wide, axis=-1, keepdims=True)) + epsilon
        )
        y = wide * inverse * _along_last(scale, x.ndim)
    return to_dtype(y, x.dtype), (x, scale, inverse)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float_matmul(x: Array, weights: Array, columns: bool = False) -> Array:
    """A product that nothing is rounded for.

    Args:
      x: [..., D], float32 or bfloat16.
      weights: [V, D]; [D, V] with ``columns``. In the dtype of ``x``.

    Returns:
      [..., V] in float32.
    """
    if native():
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        wide = weights.astype(jnp.float32)
        y = cpu.float_matmul(flat, wide, columns=columns)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    return _compiled_matmul(x, weights, columns)


def _compiled_matmul(x: Array, weights: Array, columns: bool) -> Array:
    axes = "...D,DV->...V" if columns else "...D,VD->...V"
    return jnp.einsum(axes, x, weights, preferred_element_type=jnp.float32)


def _float_matmul_fwd(x: Array, weights: Array, columns: bool) -> tuple[Array, Any]:
    return float_matmul(x, weights, columns), (x, weights)


def _float_matmul_bwd(columns: bool, residuals: Any, g: Array) -> Any:
    product = functools.partial(_compiled_matmul, columns=columns)
    return jax.vjp(product, *residuals)[1](g)


float_matmul.defvjp(_float_matmul_fwd, _float_matmul_bwd)


@jax.custom_vjp
def log_sum_exp(logits: Array) -> Array:
    """``log(sum(exp(logits)))`` over the last axis, [...], of [..., V] float32."""
    if native():
        rows = cpu.log_sum_exp(logits.reshape(-1, logits.shape[-1]))
        return rows.reshape(logits.shape[:-1])
    return jax.nn.logsumexp(logits, axis=-1)


def _log_sum_exp_fwd(logits: Array) -> tuple[Array, Any]:
    y = log_sum_exp(logits)
    return y, (logits, y)


def _log_sum_exp_bwd(residuals: Any, g: Array) -> tuple[Array]:
    logits, y = residuals
    return (g[..., None] * jnp.exp(logits - y[..., None]),)


log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)


def log_likelihood(logits: Array, tokens: Array) -> Array:
    """Log-probabilities in nats, [...] float32, of tokens [...]; logits [..., V]."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - log_sum_exp(logits)
