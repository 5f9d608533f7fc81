"""Ternary weights: codes, scales, and the module that holds the threshold."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.quant.rounding import EPSILON
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.straight_through import straight_through
from vaani_jax.quant.sums import exact_sum

Array = jax.Array


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
        """The quantized kernel ``gamma * T`` [K, N], gradients straight through."""
        codes, scale = ternarize(w, self.tau(), self.spec, self.stored())
        return straight_through(codes * scale, w)
