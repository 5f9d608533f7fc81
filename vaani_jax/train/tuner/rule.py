"""What a rule of the tuner is, and what it is given.

A rule decides one thing. It keeps its constants, its state and its sentences; what
several of them look at, such as past losses, is in `memory.Memory`. All that computes
is pure and jittable.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.config import TunerConfig
from vaani_jax.train.tuner.memory import Memory, Summary

Array = jax.Array
ByName = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the rules of one run start from.

    Attributes:
      config: in force.
      learning_rate: peak of the schedule to begin with.
      warmup_steps: of the schedule, at normal speed.
      clip_norm: the configured clipping threshold.
      momentum: the configured momentum of activation ranges; None where none is
        tracked.
      band: lowest and highest share of zeros of every ternary kernel; None leaves the
        thresholds alone.
      aggressive: whether to adjust twice as often and, in the logarithm, twice as far.
    """

    config: TunerConfig
    learning_rate: float
    warmup_steps: int
    clip_norm: float
    momentum: float | None
    band: tuple[float, float] | None
    aggressive: bool

    def factor(self, value: float) -> float:
        """A factor that a rule moves something by: squared in aggressive tuning."""
        return value**2 if self.aggressive else value


@flax.struct.dataclass
class Step:
    """A step that was computed and judged; scalars.

    Attributes:
      loss, gradient_norm, update_norm: float32, see `HyperparameterTuner.observe`.
      accepted: whether it is applied.
      calm: whether nothing about it stands out.
      calm_steps: int32, up to this one.
    """

    loss: Array
    gradient_norm: Array
    update_norm: Array
    accepted: Array
    calm: Array
    calm_steps: Array


@flax.struct.dataclass
class Change:
    """A setting before and after; ``cause`` is of the rule."""

    old: Array
    new: Array
    cause: Array

    @property
    def moved(self) -> bool:
        """Whether it is another; of a fetched one."""
        return bool(self.old != self.new)


class Rule:
    """One rule; each of its functions may be left as it is here.

    Attributes:
      setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def init(self) -> Any:
        """The state before the first step, a pytree; None where there is none."""
        return None

    def factor(self, state: Any) -> Array | None:
        """What the learning rate is multiplied with in every step; None for nothing."""
        del state
        return None

    def observe(self, state: Any, step: Step) -> Any:
        """The state after a step."""
        del step
        return state

    def adjust(self, state: Any, memory: Memory, seen: Summary) -> tuple[Any, Any]:
        """The state, and what changed, every ``interval`` steps.

        Args:
          state: its own.
          memory: of all steps so far, as the last adjustment's medians have it.
          seen: their summary now.

        Returns:
          What changed is a pytree, handed to `tell` once it is fetched; None for
          nothing.
        """
        del memory, seen
        return state, None

    def rescued(self, state: Any, memory: Memory) -> Any:
        """The state after the run went back."""
        del memory
        return state

    def tell(self, step: int, change: Any, journal: Journal) -> None:
        """Writes and says what `adjust` changed after ``step`` steps."""

    def summary(self, events: Sequence[Event]) -> list[str]:
        """Clauses on what it decided in a whole run, for people."""
        del events
        return []


def f32(value: float) -> Array:
    return jnp.asarray(value, jnp.float32)


def i32(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


def last_of(events: Sequence[Event], setting: str) -> Event | None:
    """The newest event about a setting."""
    return next((e for e in reversed(events) if e["setting"] == setting), None)
