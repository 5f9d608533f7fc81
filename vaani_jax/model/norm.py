"""Norms: modules that bring activations to one scale, and the table of them.

Packed kernels take an `RMSNorm` with the product that follows it, in one call; any
other norm is computed before it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.kernels.floats import rms_norm
from vaani_jax.quant.barriers import to_dtype
from vaani_jax.quant.sums import exact_mean

Array = jax.Array


class Norm(nn.Module):
    """A norm over the last axis, computed in float32.

    Parameters: ``scale`` [last axis], float32.
    """

    epsilon: float = 1e-5

    @nn.compact
    def weight(self, width: int) -> Array:
        """The scale [width]."""
        return self.param("scale", nn.initializers.ones, (width,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        """Maps [..., D] to [..., D], in the dtype of ``x``."""
        raise NotImplementedError


class RMSNorm(Norm):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight(x.shape[-1]), self.epsilon)


class LayerNorm(Norm):
    """``(x - mean) / sqrt(variance + epsilon) * scale`` (arXiv:1607.06450), no bias."""

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centered = wide - exact_mean(wide)
        return to_dtype(
            rms_norm(centered, self.weight(x.shape[-1]), self.epsilon), x.dtype
        )


# A further norm is a class and a row.
NORMS: dict[str, type[Norm]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
