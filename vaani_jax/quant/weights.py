"""Ternary weights: codes, scales, and the module that holds the threshold."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.quant.rounding import EPSILON
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.straight_through import straight_through
from vaani_jax.quant.sums import exact_sum

Array = jax.Array


# Of a scale in float16: the least and the largest of its numbers that are normal.
_LEAST, _LARGEST = 2.0**-14, 65504.0


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
      [N] per channel, [K / group, N] per group. ``codes * scale``, with a row of the
      latter for each group of inputs, approximates ``w``.

    Raises VaaniError where K is no multiple of the group.
    """
    w = w.astype(jnp.float32)
    if spec.granularity == "group":
        return _by_groups(w, threshold, spec, stored)
    axis = None if spec.granularity == "tensor" else 0
    shape = () if spec.granularity == "tensor" else w.shape[1:]
    magnitude = jnp.abs(w)
    terms = w.size if axis is None else w.shape[0]
    gamma = jnp.maximum(exact_sum(magnitude, axis) * (1.0 / terms), EPSILON)
    bound = threshold * gamma
    codes = jnp.where(w > bound, 1.0, jnp.where(w < -bound, -1.0, 0.0))
    if spec.scale == "absmean":
        return codes, _kept(gamma.reshape(shape), spec)
    if spec.scale == "stored":
        assert stored is not None
        return codes, stored
    total = exact_sum(jnp.abs(codes) * magnitude, axis).reshape(shape)
    count = jnp.sum(codes != 0, axis=axis).astype(jnp.float32)
    scale = jnp.maximum(total / jnp.maximum(count, 1.0), EPSILON)
    return codes, _kept(scale, spec)


def _by_groups(
    w: Array, threshold: Array | float, spec: TernarySpec, stored: Array | None
) -> tuple[Array, Array]:
    """`ternarize` with a scale for each group of inputs of an output."""
    k, n = w.shape
    if k % spec.group:
        raise VaaniError(
            f"a kernel of {k} inputs can't have a scale per {spec.group} of them: the"
            " inputs must be a multiple of quantization.weight_group"
        )
    channel = dataclasses.replace(spec, granularity="channel")

    def one(part: Array, kept: Array | None) -> tuple[Array, Array]:
        return ternarize(part, threshold, channel, kept)

    parts = w.reshape(k // spec.group, spec.group, n)
    axes = (0, None if stored is None else 0)
    codes, scale = jax.vmap(one, in_axes=axes)(parts, stored)
    return codes.reshape(k, n), scale


def _kept(scale: Array, spec: TernarySpec) -> Array:
    """A scale as it is kept, in float32."""
    if spec.scale_dtype == "float32":
        return scale
    scale = jnp.clip(scale, _LEAST, _LARGEST)
    return jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10)


def along_inputs(scale: Array, k: int) -> Array:
    """A scale that a kernel [k, n] can be multiplied with: [], [1, n] or [k, n]."""
    if scale.ndim == 2:
        return jnp.repeat(scale, k // scale.shape[0], axis=0)
    return scale if scale.ndim == 0 else scale[None, :]


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
    def stored(self, k: int, n: int) -> Array | None:
        """The stored scale of a kernel [k, n], float32; None where it is computed."""
        if self.spec.scale != "stored":
            return None
        shape = self.spec.scale_shape(k, n)
        return self.variable("quant", "scale", jnp.ones, shape, jnp.float32).value

    def __call__(self, w: Array) -> Array:
        """The quantized kernel ``gamma * T`` [K, N], gradients straight through."""
        codes, scale = ternarize(w, self.tau(), self.spec, self.stored(*w.shape))
        return straight_through(codes * along_inputs(scale, len(w)), w)
