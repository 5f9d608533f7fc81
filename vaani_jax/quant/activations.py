"""8-bit activations: codes, scales, and the module that may track a range."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.devices.apart import largest
from vaani_jax.quant.rounding import EPSILON, LARGEST, to_codes
from vaani_jax.quant.straight_through import straight_through

Array = jax.Array


LOWEST = -128.0  # of their codes


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
    codes = to_codes(x * (LARGEST / bound), LOWEST)
    return codes, bound * (1.0 / LARGEST)


def quantize_by_groups(x: Array, group: int) -> tuple[Array, Array]:
    """8-bit codes of activations with a scale for every ``group`` inputs of a token.

    Args:
      x: [..., K], any float dtype; K a multiple of ``group``.

    Returns:
      codes [..., K] float32, and bounds [..., K / group], float32: what maps to 127.
    """
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group)
    bound = activation_bound(parts)
    return quantize_activations(parts, bound)[0].reshape(x.shape), bound[..., 0]


def activation_bound(x: Array, activation_range: Array | None = None) -> Array:
    """The magnitude that maps to 127, float32: [..., 1] per token, or [] if given."""
    if activation_range is None:
        x = x.astype(jnp.float32)
        activation_range = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.maximum(activation_range, EPSILON)


def integers(x: Array, activation_range: Array | None) -> tuple[Array, Array]:
    """For products of integers, which have no NaN: what is not finite is in the bound.

    Args:
      x: activations [M, K], float32.
      activation_range: see `quantize_activations`.

    Returns:
      codes [M, K] float32, and their bound [M, 1]: NaN where a row is not finite.
    """
    bound = activation_bound(x, activation_range)
    codes = quantize_activations(x, bound)[0]
    lost = jnp.isnan(codes).any(axis=-1, keepdims=True)
    return jnp.where(lost, 0.0, codes), jnp.where(lost, jnp.nan, bound)


class ActivationQuantizer(nn.Module):
    """8-bit activations, per token, per group of inputs, or with a tracked range.

    With ``tracking="ema"`` the range is ``m * range + (1 - m) * max|x|``, updated while
    training and frozen in evaluation; the first batch sets it.

    Variables, for "ema" only: ``quant/range`` and ``quant/momentum``, float32 scalars.
    """

    tracking: Literal["token", "ema", "group", "none"] = "token"
    momentum: float = 0.99
    group: int = 32

    @nn.compact
    def observe(self, x: Array, *, train: bool) -> Array | None:
        """The range to quantize ``x [..., K]`` with: a scalar, or None per token."""
        if self.tracking != "ema":
            return None
        tracked = self.variable("quant", "range", jnp.zeros, (), jnp.float32)
        momentum = self.variable(
            "quant", "momentum", lambda: jnp.asarray(self.momentum, jnp.float32)
        )
        found = largest(x)
        if not train or self.is_initializing():
            return jnp.where(tracked.value > 0, tracked.value, found)
        m = momentum.value
        updated = jnp.where(
            tracked.value > 0, m * tracked.value + (1 - m) * found, found
        )
        tracked.value = updated
        return updated

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """The quantized activations ``s * q`` [..., K], gradients straight through."""
        if self.tracking == "none":
            return x
        if self.tracking == "group":
            codes, bound = quantize_by_groups(x, self.group)
            scale = jnp.repeat(bound * (1.0 / LARGEST), self.group, axis=-1)
        else:
            codes, scale = quantize_activations(x, self.observe(x, train=train))
        return straight_through(codes * scale, x)
