"""RMSNorm as a module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.quant.norm import rms_norm

Array = jax.Array


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in float32.

    Parameters: ``scale`` [last axis], float32.
    """

    epsilon: float = 1e-5

    @nn.compact
    def weight(self, width: int) -> Array:
        """The scale [width]."""
        return self.param("scale", nn.initializers.ones, (width,), jnp.float32)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight(x.shape[-1]), self.epsilon)
