"""Products of 8-bit activations with ternary kernels, with their gradients."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.devices.mesh import constrain
from vaani_jax.quant.activations import (
    activation_bound,
    quantize_activations,
)
from vaani_jax.quant.barriers import to_dtype
from vaani_jax.quant.held import Held
from vaani_jax.quant.rounding import LARGEST
from vaani_jax.quant.spec import Split, TernarySpec, operand_dtype
from vaani_jax.quant.weights import ternarize
from vaani_jax.quant.wire import STORED, opened, receive, send

Array = jax.Array


def output_scale(bound: Array, scale: Array, ndim: int) -> Array:
    """What turns an integer product into its value, rounded in one order everywhere.

    It is the order that XLA gives the three factors when it compiles them, written out,
    so that compiled code, eager code and kernels agree to the bit.

    Args:
      bound: of the activations, see `activation_bound`.
      scale: of the kernel, [] or [N].
      ndim: of the product.

    Returns:
      float32, [..., 1] or [..., N] with ``ndim`` axes; [] where both are scalars.
    """
    part = 1.0 / LARGEST
    if scale.ndim == 0:
        return bound * (scale * part)
    return (bound * part) * _along_last(scale, ndim)


def _along_last(scale: Array, ndim: int) -> Array:
    """A scalar as it is, [N] as [1, ..., 1, N]."""
    return scale if scale.ndim == 0 else scale.reshape((1,) * (ndim - 1) + (-1,))


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def ternary_dot(
    x: Array,
    kernels: Sequence[Array],
    thresholds: Sequence[Array],
    *,
    spec: TernarySpec = TernarySpec(),
    scales: Sequence[Array | None] | None = None,
    held: Sequence[Held | None] | None = None,
    activation_range: Array | None = None,
    mix: Array | None = None,
    split: Split = "out",
) -> tuple[Array, ...]:
    """Products of one quantized input with several ternary kernels.

    Projections that share an input (query, key and value; gate and up) share its
    quantization; each kernel keeps its own threshold and scale.

    Args:
      x: activations [..., K], float32 or bfloat16.
      kernels: master kernels [K, N_i].
      thresholds: tau of each kernel, scalars.
      spec: how to quantize.
      scales: of each kernel, where they are "stored".
      held: codes and scale of each kernel, where they have been computed before.
      activation_range: see `quantize_activations`.
      mix: lambda in [0, 1], a scalar, may be traced: 0 multiplies the full-precision
        operands, 1 the quantized ones. None stands for 1 and is faster. At 1 both
        give the same bits.
      split: which dimension of the kernels the mesh axis ``tensor`` cuts, if there is
        one: the outputs, or the inputs that are summed over.

    Returns:
      One [..., N_i] in ``x.dtype`` per kernel. Gradients are straight-through:
      thresholds, range and mix receive zeros.
    """
    nothing = (None,) * len(kernels)
    return _ternary_dot(
        spec,
        split,
        x,
        tuple(kernels),
        nothing if held is None else tuple(held),
        tuple(thresholds),
        nothing if scales is None else tuple(scales),
        activation_range,
        mix,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ternary_dot(
    spec: TernarySpec,
    split: Split,
    x: Array,
    kernels: tuple[Array, ...],
    held: tuple[Held | None, ...],
    thresholds: tuple[Array, ...],
    stored: tuple[Array | None, ...],
    activation_range: Array | None,
    mix: Array | None,
) -> tuple[Array, ...]:
    return _ternary_dot_fwd(
        spec, split, x, kernels, held, thresholds, stored, activation_range, mix
    )[0]


def _ternary_dot_fwd(
    spec: TernarySpec,
    split: Split,
    x: Array,
    kernels: tuple[Array, ...],
    held: tuple[Held | None, ...],
    thresholds: tuple[Array, ...],
    stored: tuple[Array | None, ...],
    activation_range: Array | None,
    mix: Array | None,
) -> tuple[tuple[Array, ...], Any]:
    bound = activation_bound(x, activation_range)
    q, s = quantize_activations(x, bound)
    # A mix is no integer.
    dtype = operand_dtype(spec.operands) if mix is None else jnp.dtype(jnp.float32)
    total = jnp.int32 if dtype == jnp.int8 else jnp.float32
    rest = None if mix is None else 1.0 - mix.astype(jnp.float32)
    if rest is not None:
        # In units of the scale, so that lambda = 1 leaves exactly the integers.
        q = q + rest * (x.astype(jnp.float32) / s - q)
    q = _as_rows(q.astype(dtype))
    outputs, quantized = [], []
    for w, ready, threshold, kept in zip(
        kernels, held, thresholds, stored, strict=True
    ):
        if ready is None:
            t, scale = ternarize(w, threshold, spec, kept)
        else:
            t, scale = ready.values(split), ready.scale
        if rest is not None:
            t = t + rest * (w.astype(jnp.float32) / _along_last(scale, 2) - t)
            sent = send(t, dtype, "float", split)
        elif ready is None or spec.wire == "float":
            sent = send(t, dtype, spec.wire, split)
        else:
            sent = ready.codes
        t = _multiplied(sent, ready, dtype, split)
        sums = jnp.dot(q, t, precision="highest", preferred_element_type=total)
        sums = sums.astype(jnp.float32).reshape(*x.shape[:-1], t.shape[-1])
        outputs.append(to_dtype(sums * output_scale(bound, scale, x.ndim), x.dtype))
        quantized.append((sent, scale))  # cut, so that no kernel is kept whole
    rest_of_arguments = (thresholds, stored, activation_range, mix)
    residuals = (x, q, s, quantized, kernels, held, rest_of_arguments)
    return tuple(outputs), residuals


def _multiplied(sent: Array, ready: Held | None, dtype: Any, split: Split) -> Array:
    """What crossed the wire, or has before, as an operand [K, N]."""
    if ready is not None and ready.whole:
        return opened(sent, dtype, split)
    return receive(sent, dtype, split)


def _ternary_dot_bwd(
    spec: TernarySpec, split: Split, residuals: Any, gs: tuple[Array, ...]
) -> Any:
    del spec
    x, q, s, quantized, kernels, held, rest_of_arguments = residuals
    dtype = gs[0].dtype
    s = s if s.ndim == 0 else _as_rows(s)
    x_quantized = (q.astype(jnp.float32) * s).astype(dtype)
    dx = jnp.zeros((), dtype)
    dws = []
    for g, (sent, scale), w, ready in zip(gs, quantized, kernels, held, strict=True):
        g = _as_rows(g)
        t = _multiplied(sent, ready, q.dtype, split)
        w_quantized = (t.astype(jnp.float32) * _along_last(scale, 2)).astype(dtype)
        dx = dx + jnp.dot(g, w_quantized.T)
        dw = jnp.dot(x_quantized.T, g, preferred_element_type=jnp.float32)
        dws.append(constrain(dw.astype(w.dtype), *STORED[split]))
    return (
        dx.astype(x.dtype).reshape(x.shape),
        tuple(dws),
        None,
        *jax.tree.map(jnp.zeros_like, rest_of_arguments),
    )


_ternary_dot.defvjp(_ternary_dot_fwd, _ternary_dot_bwd)
