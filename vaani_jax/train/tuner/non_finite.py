"""A step whose loss or norms are not finite is skipped."""

import jax
import jax.numpy as jnp

from vaani_jax.train.tuner.rule import Rule
from vaani_jax.train.tuner.verdict import Verdict

Array = jax.Array


class NonFinite(Rule):
    """Skips what no optimizer may take in. It has no state and no constants."""

    def finite(self, *values: Array) -> Array:
        """Whether all of them are."""
        result = jnp.isfinite(values[0])
        for value in values[1:]:
            result = result & jnp.isfinite(value)
        return result

    def cause(self, verdict: Verdict, layer: str) -> str:
        """Why a step was skipped."""
        del verdict
        return f"loss or gradients are not finite; foremost in {layer}"
