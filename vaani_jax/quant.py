r"""Ternary weights and 8-bit activations, with straight-through gradients.

The maths (arXiv:2402.17764 and the training-tips FAQ that came with it), for a
kernel ``W [K, N]`` and activations ``x [..., K]``:

* weights, per tensor:   ``gamma = max(mean|W|, 1e-5)``,
  ``T = sign(W) * (|W| > tau * gamma)``, so that ``W ~ gamma * T``.
  ``tau = 0.5`` is ``clip(round(W / gamma), -1, 1)``, the rule of b1.58.
* activations, per token: ``s = max(max|x|, 1e-5) / 127``,
  ``q = clip(round(x / s), -128, 127)`` (half to even), so that ``x ~ s * q``.
* product: ``y = (q @ T) * (s * gamma)``, where ``s * gamma`` is rounded in one order
  everywhere (`output_scale`).

``q`` and ``T`` are small integers that ride in floats. Their products summed over K
inputs stay below ``127 * K``: float32 accumulation is exact for ``K < 132,000`` and
bfloat16 holds every operand exactly, so ``q @ T`` is, bit for bit, what an
int8 x ternary integer kernel computes, whatever the dtype of the operands. Beyond that
K, float32 sums round on the way; int8 operands sum exactly in int32 (up to K of
16 million) and round once, when the sum becomes a float32.

The sums behind ``gamma`` and ``alpha`` are exact, too (`exact_sum`): a kernel has one
scale, whatever the order in which it is read, and however it is cut over devices.

Straight through: the gradient passes both quantisers unchanged and unmasked,
``dL/dx = g @ (gamma T)^T`` and ``dL/dW = (s q)^T @ g``.

Beyond b1.58: any threshold ``tau``; the least-squares scale of ternary weight
networks (arXiv:1605.04711), ``alpha = sum(|W| |T|) / sum(|T|)``; scales per output
channel; a tracked activation range in the place of the per-token one; and a mix
``lambda`` that moves the operands from full precision (0) to quantised (1).
"""

import dataclasses
import functools
import math
import platform
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.sharding import AXES, constrain, shards

Array = jax.Array

EPSILON = 1e-5  # lower bound of every scale, as in the reference implementations
ACTIVATION_MAX = 127.0
ACTIVATION_MIN = -128.0

WeightScale = Literal["absmean", "least_squares", "stored"]
Granularity = Literal["tensor", "channel"]
OperandDtype = Literal["auto", "bfloat16", "float32", "int8"]
Wire = Literal["2bit", "int8", "float"]
Split = Literal["out", "in"]


@dataclasses.dataclass(frozen=True)
class TernarySpec:
    """How a product quantises; static, hashable.

    Attributes:
      scale: "absmean" (b1.58), "least_squares" (arXiv:1605.04711), or "stored": a
        number kept beside the kernel, for weights that came as codes and a scale.
      granularity: one scale per "tensor" or per output "channel".
      operands: dtype in which the integers of the forward product ride, and in which
        the backward pass keeps them: "float32", "bfloat16", "int8" (summed in int32).
        The result is the same to the bit; "auto" takes the fastest one that has been
        measured (see `operand_dtype`). With a ``mix`` they ride in float32.
      wire: what devices send each other of a kernel that is cut over them: codes of
        2 or of 8 bits, or the operands. The result is the same to the bit.
    """

    scale: WeightScale = "absmean"
    granularity: Granularity = "tensor"
    operands: OperandDtype = "auto"
    wire: Wire = "2bit"


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot-product instructions."""
    if platform.system() != "Linux":
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def operand_dtype(choice: OperandDtype) -> Any:
    """The dtype of the forward product's operands on the default backend.

    Accelerators multiply bfloat16 at full speed and so do CPUs with AVX-512 BF16 or
    AMX; elsewhere float32 is faster. "auto" never takes int8: the matrix units of GPUs
    and most TPUs are twice as fast in it on paper, but no one has measured it here yet
    (``benchmarks/train_step.py --accelerator`` would). It does halve what the backward
    pass keeps of the operands. XLA's CPU code multiplies int8 slowly.
    """
    if choice == "auto":
        fast = jax.default_backend() != "cpu" or _cpu_multiplies_bfloat16()
        return jnp.bfloat16 if fast else jnp.float32
    return jnp.dtype(choice)


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


def _digits(x: Array) -> list[Array]:
    """Of integers [...] below 2^31, the lowest first."""
    mask = 2**_DIGIT - 1
    return [(x >> _DIGIT * place) & mask for place in range(3)]


def _power_of_two(exponent: Array) -> Array:
    """2^exponent, float32, of int32 exponents from -126 to 127."""
    bits = (exponent + _FLOAT32_BIAS) << _FLOAT32_MANTISSA
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def ternarize(
    w: Array,
    threshold: Array | float,
    spec: TernarySpec = TernarySpec(),
    stored: Array | None = None,
) -> tuple[Array, Array]:
    """Ternary codes and scale of a kernel.

    Args:
      w: kernel [K, N], any float dtype.
      threshold: tau, in units of mean|W|; a scalar, may be traced.
      spec: kind and granularity of the scale.
      stored: the scale, where its kind is "stored".

    Returns:
      codes [K, N] float32 in {-1, 0, 1}, and the scale in float32: [] per tensor,
      [N] per channel. ``codes * scale`` approximates ``w``.
    """
    w = w.astype(jnp.float32)
    axis = None if spec.granularity == "tensor" else 0
    shape = () if spec.granularity == "tensor" else w.shape[1:]
    magnitude = jnp.abs(w)
    terms = w.size if axis is None else w.shape[0]
    gamma = jnp.maximum(exact_sum(magnitude, axis) * (1.0 / terms), EPSILON)
    bound = threshold * gamma
    codes = jnp.where(w > bound, 1.0, jnp.where(w < -bound, -1.0, 0.0))
    if spec.scale == "absmean":
        return codes, gamma.reshape(shape)
    if spec.scale == "stored":
        assert stored is not None
        return codes, stored
    total = exact_sum(jnp.abs(codes) * magnitude, axis).reshape(shape)
    count = jnp.sum(codes != 0, axis=axis).astype(jnp.float32)
    return codes, jnp.maximum(total / jnp.maximum(count, 1.0), EPSILON)


def quantize_activations(
    x: Array, activation_range: Array | None = None
) -> tuple[Array, Array]:
    """8-bit codes of activations.

    Args:
      x: activations [..., K], any float dtype.
      activation_range: the magnitude that maps to 127, a scalar; the largest
        magnitude of each token (last axis) where None.

    Returns:
      codes [..., K] float32, integers in [-128, 127], and the scale in float32,
      [..., 1] per token or [] for a given range. ``codes * scale`` approximates
      ``x``.
    """
    x = x.astype(jnp.float32)
    bound = activation_bound(x, activation_range)
    # Multiplying by reciprocals, and saying so, keeps compiled and eager code equal
    # to the bit: XLA would rewrite the divisions.
    codes = jnp.clip(
        jnp.round(x * (ACTIVATION_MAX / bound)), ACTIVATION_MIN, ACTIVATION_MAX
    )
    return codes, bound * (1.0 / ACTIVATION_MAX)


def activation_bound(x: Array, activation_range: Array | None = None) -> Array:
    """The magnitude that maps to 127, float32: [..., 1] per token, or [] if given."""
    if activation_range is None:
        x = x.astype(jnp.float32)
        activation_range = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.maximum(activation_range, EPSILON)


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
    part = 1.0 / ACTIVATION_MAX
    if scale.ndim == 0:
        return bound * (scale * part)
    return (bound * part) * _along_last(scale, ndim)


def straight_through(value: Array, surrogate: Array) -> Array:
    """``value`` forward; in the backward pass the gradient goes to ``surrogate``."""
    return _straight_through(surrogate, jax.lax.stop_gradient(value))


@jax.custom_vjp
def _straight_through(surrogate: Array, value: Array) -> Array:
    return value.astype(surrogate.dtype)


def _straight_through_fwd(surrogate: Array, value: Array) -> tuple[Array, Array]:
    return value.astype(surrogate.dtype), value


def _straight_through_bwd(value: Array, g: Array) -> tuple[Array, Array]:
    return g, jnp.zeros_like(value)


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)


def _along_last(scale: Array, ndim: int) -> Array:
    """A scalar as it is, [N] as [1, ..., 1, N]."""
    return scale if scale.ndim == 0 else scale.reshape((1,) * (ndim - 1) + (-1,))


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


# The axes of a kernel's dimensions, as stored and where it is multiplied.
_STORED = {"out": ("fsdp", "tensor"), "in": ("tensor", "fsdp")}
_MULTIPLIED = {"out": (None, "tensor"), "in": ("tensor", None)}
_PACKED = {"out": 1, "in": 0}  # the dimension along which codes share a byte


def _shifts(axis: int) -> Array:
    """Bits to shift the four codes of a byte by, along ``axis + 1`` of three."""
    shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)
    return shift.reshape(4, 1) if axis == 0 else shift


def _sent(t: Array, dtype: Any, wire: Wire, split: Split) -> Array:
    """Operands [K, N] as they cross the wire: each device codes its own part.

    2-bit codes are ``t + 1``, four neighbours in a byte, the lowest bits first, along
    the dimension that ``fsdp`` leaves whole: [K, N / 4] or, split "in", [K / 4, N].
    Where ``tensor`` cuts it so that four don't stay together, codes have 8 bits.
    """
    if shards("fsdp") == 1 or wire == "float":
        return t.astype(dtype)
    axis = _PACKED[split]
    if wire == "int8" or t.shape[axis] % (4 * shards("tensor")):
        return t.astype(jnp.int8)
    codes = (t + 1).astype(jnp.uint8)
    codes = codes.reshape(*t.shape[:axis], -1, 4, *t.shape[axis + 1 :])
    return jnp.sum(codes << _shifts(axis), axis=axis + 1, dtype=jnp.uint8)


def _received(sent: Array, dtype: Any, split: Split) -> Array:
    """What `_sent` made of operands, whole along ``fsdp``, as [K, N] in ``dtype``."""
    if shards("fsdp") == 1:
        return sent
    sent = constrain(sent, *_STORED[split])
    sent = constrain(sent, *_MULTIPLIED[split])
    if sent.dtype != jnp.uint8:
        return sent.astype(dtype)
    axis = _PACKED[split]
    codes = (jnp.expand_dims(sent, axis + 1) >> _shifts(axis)) & 3
    shape = list(sent.shape)
    shape[axis] *= 4
    return (codes.astype(jnp.int8) - 1).reshape(shape).astype(dtype)


def whole_kernel(w: Array, dtype: Any, split: Split) -> Array:
    """A kernel [K, N] in ``dtype``, whole along ``fsdp``: for plain products."""
    return _received(_sent(w, dtype, "float", split), dtype, split)


def ternary_dot(
    x: Array,
    kernels: Sequence[Array],
    thresholds: Sequence[Array],
    *,
    spec: TernarySpec = TernarySpec(),
    scales: Sequence[Array | None] | None = None,
    activation_range: Array | None = None,
    mix: Array | None = None,
    split: Split = "out",
) -> tuple[Array, ...]:
    """Products of one quantised input with several ternary kernels.

    Projections that share an input (query, key and value; gate and up) share its
    quantisation; each kernel keeps its own threshold and scale.

    Args:
      x: activations [..., K], float32 or bfloat16.
      kernels: master kernels [K, N_i].
      thresholds: tau of each kernel, scalars.
      spec: how to quantise.
      scales: of each kernel, where they are "stored".
      activation_range: see `quantize_activations`.
      mix: lambda in [0, 1], a scalar, may be traced: 0 multiplies the full-precision
        operands, 1 the quantised ones. None stands for 1 and is faster. At 1 both
        give the same bits.
      split: which dimension of the kernels the mesh axis ``tensor`` cuts, if there is
        one: the outputs, or the inputs that are summed over.

    Returns:
      One [..., N_i] in ``x.dtype`` per kernel. Gradients are straight-through:
      thresholds, range and mix receive zeros.
    """
    stored = (None,) * len(kernels) if scales is None else tuple(scales)
    taus = tuple(thresholds)
    return _ternary_dot(
        spec, split, x, tuple(kernels), taus, stored, activation_range, mix
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ternary_dot(
    spec: TernarySpec,
    split: Split,
    x: Array,
    kernels: tuple[Array, ...],
    thresholds: tuple[Array, ...],
    stored: tuple[Array | None, ...],
    activation_range: Array | None,
    mix: Array | None,
) -> tuple[Array, ...]:
    return _ternary_dot_fwd(
        spec, split, x, kernels, thresholds, stored, activation_range, mix
    )[0]


def _ternary_dot_fwd(
    spec: TernarySpec,
    split: Split,
    x: Array,
    kernels: tuple[Array, ...],
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
    outputs, quantised = [], []
    for w, threshold, kept in zip(kernels, thresholds, stored, strict=True):
        t, scale = ternarize(w, threshold, spec, kept)
        wire = spec.wire
        if rest is not None:
            t = t + rest * (w.astype(jnp.float32) / _along_last(scale, 2) - t)
            wire = "float"
        sent = _sent(t, dtype, wire, split)
        t = _received(sent, dtype, split)
        sums = jnp.dot(q, t, precision="highest", preferred_element_type=total)
        sums = sums.astype(jnp.float32).reshape(*x.shape[:-1], t.shape[-1])
        outputs.append((sums * output_scale(bound, scale, x.ndim)).astype(x.dtype))
        quantised.append((sent, scale))  # cut, so that no kernel is kept whole
    rest_of_arguments = (thresholds, stored, activation_range, mix)
    residuals = (x, q, s, quantised, kernels, rest_of_arguments)
    return tuple(outputs), residuals


def _ternary_dot_bwd(
    spec: TernarySpec, split: Split, residuals: Any, gs: tuple[Array, ...]
) -> Any:
    del spec
    x, q, s, quantised, kernels, rest_of_arguments = residuals
    dtype = gs[0].dtype
    s = s if s.ndim == 0 else _as_rows(s)
    x_quantised = (q.astype(jnp.float32) * s).astype(dtype)
    dx = jnp.zeros((), dtype)
    dws = []
    for g, (sent, scale), w in zip(gs, quantised, kernels, strict=True):
        g = _as_rows(g)
        t = _received(sent, q.dtype, split)
        w_quantised = (t.astype(jnp.float32) * _along_last(scale, 2)).astype(dtype)
        dx = dx + jnp.dot(g, w_quantised.T)
        dw = jnp.dot(x_quantised.T, g, preferred_element_type=jnp.float32)
        dws.append(constrain(dw.astype(w.dtype), *_STORED[split]))
    return (
        dx.astype(x.dtype).reshape(x.shape),
        tuple(dws),
        *jax.tree.map(jnp.zeros_like, rest_of_arguments),
    )


_ternary_dot.defvjp(_ternary_dot_fwd, _ternary_dot_bwd)


class TernaryQuantizer(nn.Module):
    """Ternary weights with a threshold that is data, not a constant.

    Variables: ``quant/threshold``, a float32 scalar: changing it never recompiles;
    ``quant/scale`` besides, where the scale is "stored".
    """

    threshold: float = 0.5
    spec: TernarySpec = TernarySpec()

    @nn.compact
    def tau(self) -> Array:
        """The threshold, a float32 scalar."""
        variable = self.variable(
            "quant",
            "threshold",
            lambda: jnp.asarray(self.threshold, jnp.float32),
        )
        return variable.value

    @nn.compact
    def stored(self) -> Array | None:
        """The stored scale, a float32 scalar; None where it is computed."""
        if self.spec.scale != "stored":
            return None
        return self.variable("quant", "scale", jnp.ones, (), jnp.float32).value

    def __call__(self, w: Array) -> Array:
        """The quantised kernel ``gamma * T`` [K, N], gradients straight through."""
        codes, scale = ternarize(w, self.tau(), self.spec, self.stored())
        return straight_through(codes * scale, w)


class ActivationQuantizer(nn.Module):
    """8-bit activations, per token or with a tracked range.

    With ``tracking="ema"`` the range is ``m * range + (1 - m) * max|x|``, updated while
    training and frozen in evaluation; the first batch sets it.

    Variables, for "ema" only: ``quant/range`` and ``quant/momentum``, float32 scalars.
    """

    tracking: Literal["token", "ema"] = "token"
    momentum: float = 0.99

    @nn.compact
    def observe(self, x: Array, *, train: bool) -> Array | None:
        """The range to quantise ``x [..., K]`` with: a scalar, or None per token."""
        if self.tracking == "token":
            return None
        tracked = self.variable("quant", "range", jnp.zeros, (), jnp.float32)
        momentum = self.variable(
            "quant", "momentum", lambda: jnp.asarray(self.momentum, jnp.float32)
        )
        largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
        largest = jax.lax.stop_gradient(largest)
        if not train or self.is_initializing():
            return jnp.where(tracked.value > 0, tracked.value, largest)
        m = momentum.value
        updated = jnp.where(
            tracked.value > 0, m * tracked.value + (1 - m) * largest, largest
        )
        tracked.value = updated
        return updated

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """The quantised activations ``s * q`` [..., K], gradients straight through."""
        codes, scale = quantize_activations(x, self.observe(x, train=train))
        return straight_through(codes * scale, x)
