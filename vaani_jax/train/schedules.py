"""Learning rate and weight decay as functions of the step."""

import dataclasses

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.train.optimizers import OptimConfig

Array = jax.Array


# Peaks for where nothing better is known: measured on a small character model.
USUAL_LEARNING_RATES = {"adamw": 3e-3, "muon": 1e-2}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as functions of the step.

    Attributes:
      config: shape of the schedule.
      peak: learning rate after warm-up.
      num_steps: length of the run.
    """

    config: OptimConfig
    peak: float
    num_steps: int

    def __post_init__(self) -> None:
        if self.peak <= 0:
            raise VaaniError(f"learning_rate is {self.peak}: it must be above 0")

    def learning_rate(self, step: Array) -> Array:
        """The learning rate of a step, counted from 0; float32, may be traced."""
        # step + 1: the first step of a warm-up moves, the one after the last would be
        # the end of the decay.
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((step + 1) / max(1, self.warmup_steps), 1.0)
        return self.peak * ramp * self.decay(step)

    @property
    def warmup_steps(self) -> int:
        """Of the warm-up, which a shorter run cuts."""
        return min(self.config.warmup_steps, self.num_steps)

    def decay(self, step: Array) -> Array:
        """The learning rate over its peak, warm-up left out, in [0, 1]."""
        c = self.config
        step = jnp.asarray(step, jnp.float32)
        warmup = self.warmup_steps
        done = jnp.clip((step - warmup) / max(1, self.num_steps - warmup), 0.0, 1.0)
        linear = 1 - (1 - c.final_ratio) * done
        if c.schedule == "constant":
            return jnp.ones_like(done)
        if c.schedule == "linear":
            return linear
        if c.schedule == "cosine":
            half = (1 + jnp.cos(jnp.pi * done)) / 2
            return c.final_ratio + (1 - c.final_ratio) * half
        return linear * jnp.where(self._second_stage(step), c.second_stage_ratio, 1.0)

    def weight_decay(self, step: Array) -> Array:
        """The weight decay of a step, counted from 0; float32, may be traced."""
        c = self.config
        step = jnp.asarray(step, jnp.float32)
        full = jnp.full_like(step, c.weight_decay)
        if c.schedule == "two_stage":
            return jnp.where(self._second_stage(step), 0.0, full)
        return full

    def _second_stage(self, step: Array) -> Array:
        return 2 * step >= self.num_steps
