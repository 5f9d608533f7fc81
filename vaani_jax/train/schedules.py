"""Learning rate and weight decay as functions of the step."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.settings import named
from vaani_jax.train.optimizers import OptimConfig

Array = jax.Array

# Of the config, the share of the run done after warm-up, in [0, 1], and whether the
# second half has begun: a factor in [0, 1], float32. All may be traced.
Factor = Callable[[OptimConfig, Array, Array], Array]


def _linear(config: OptimConfig, done: Array, second_half: Array) -> Array:
    del second_half
    return 1 - (1 - config.final_ratio) * done


def _cosine(config: OptimConfig, done: Array, second_half: Array) -> Array:
    del second_half
    half = (1 + jnp.cos(jnp.pi * done)) / 2
    return config.final_ratio + (1 - config.final_ratio) * half


def _constant(config: OptimConfig, done: Array, second_half: Array) -> Array:
    del config, second_half
    return jnp.ones_like(done)


def _two_stage(config: OptimConfig, done: Array, second_half: Array) -> Array:
    drop = jnp.where(second_half, config.second_stage_ratio, 1.0)
    return _linear(config, done, second_half) * drop


def _full_weight_decay(config: OptimConfig, done: Array, second_half: Array) -> Array:
    del config, second_half
    return jnp.ones_like(done)


def _first_half_weight_decay(
    config: OptimConfig, done: Array, second_half: Array
) -> Array:
    del config
    return jnp.where(second_half, 0.0, jnp.ones_like(done))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A kind of schedule.

    Attributes:
      decay: learning rate over its peak, warm-up left out.
      weight_decay: weight decay over the configured one.
    """

    decay: Factor
    weight_decay: Factor = _full_weight_decay


# A further schedule is a function and a row.
SCHEDULES: dict[str, Shape] = {
    "linear": Shape(_linear),
    "cosine": Shape(_cosine),
    "constant": Shape(_constant),
    # Of b1.58: a linear decay whose peak drops at half of the run, where weight decay
    # goes to 0.
    "two_stage": Shape(_two_stage, _first_half_weight_decay),
}


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
        named(SCHEDULES, self.config.schedule, "optim.schedule")

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
        return SCHEDULES[self.config.schedule].decay(self.config, *self._at(step))

    def weight_decay(self, step: Array) -> Array:
        """The weight decay of a step, counted from 0; float32, may be traced."""
        shape = SCHEDULES[self.config.schedule]
        share = shape.weight_decay(self.config, *self._at(step))
        return self.config.weight_decay * share

    def _at(self, step: Array) -> tuple[Array, Array]:
        """The share of the run done after warm-up, and whether its half is past."""
        step = jnp.asarray(step, jnp.float32)
        warmup = self.warmup_steps
        done = jnp.clip((step - warmup) / max(1, self.num_steps - warmup), 0.0, 1.0)
        return done, 2 * step >= self.num_steps
