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
    quantize_by_groups,
)
from vaani_jax.quant.barriers import to_dtype
from vaani_jax.quant.groups import check_groups, grouped_product
from vaani_jax.quant.held import Held
from vaani_jax.quant.rounding import LARGEST
from vaani_jax.quant.spec import Split, TernarySpec, operand_dtype
from vaani_jax.quant.weights import along_inputs, ternarize
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


def integers_of(
    x: Array, group: int, activation_range: Array | None
) -> tuple[Array, Array, Array]:
    """Activations [..., K] as a product takes them.

    Args:
      x: any float dtype.
      group: inputs with a scale of their own; 0 for a scale per token.
      activation_range: see `quantize_activations`; not with a group.

    Returns:
      codes [..., K] float32; their scales, which they can be multiplied with; and
      bounds, see `activation_bound`, or [..., K / group].
    """
    if not group:
        bound = activation_bound(x, activation_range)
        return *quantize_activations(x, bound), bound
    check_groups(x.shape[-1], group, group)
    q, bound = quantize_by_groups(x, group)
    return q, jnp.repeat(bound * (1.0 / LARGEST), group, axis=-1), bound


def scaled_product(
    q: Array,
    t: Array,
    scale: Array,
    bound: Array,
    shape: tuple[int, ...],
    total: Any,
    *,
    grouped: bool,
) -> Array:
    """``q @ t`` times its scales.

    Args:
      q: integers [M, K] of activations of ``shape`` [..., K].
      t: ternary weights [K, N] in the same dtype.
      scale: of the weights, [], [N] or [K / group, N].
      bound: of the activations, see `integers_of`.
      total: dtype of sums of products of integers.
      grouped: whether activations have a scale per group, even if that is all of K.

    Returns:
      [..., N] float32.
    """
    shape = (*shape[:-1], t.shape[-1])
    if scale.ndim < 2 and not grouped:
        sums = jnp.dot(q, t, precision="highest", preferred_element_type=total)
        sums = sums.astype(jnp.float32).reshape(shape)
        return sums * output_scale(bound, scale, len(shape))
    token = bound * (1.0 / LARGEST)
    token = token.reshape(-1, token.shape[-1]) if token.ndim else token
    if token.ndim == 0 or len(token) != len(q):
        token = jnp.broadcast_to(token, (len(q), 1))
    return grouped_product(q, t, scale, token).reshape(shape)


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
      spec: how to quantize; its activations are rounded.
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
    q, s, bound = integers_of(x, spec.pieces, activation_range)
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
            t = t + rest * (w.astype(jnp.float32) / along_inputs(scale, len(w)) - t)
            sent = send(t, dtype, "float", split)
        elif ready is None or spec.wire == "float":
            sent = send(t, dtype, spec.wire, split)
        else:
            sent = ready.codes
        t = _multiplied(sent, ready, dtype, split)
        y = scaled_product(q, t, scale, bound, x.shape, total, grouped=spec.pieces > 0)
        outputs.append(to_dtype(y, x.dtype))
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
        w_quantized = t.astype(jnp.float32) * along_inputs(scale, len(t))
        w_quantized = w_quantized.astype(dtype)
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
