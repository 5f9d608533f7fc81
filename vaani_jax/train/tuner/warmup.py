"""The warm-up advances faster while training is calm, and slower while it is not."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import Memory, Summary
from vaani_jax.train.tuner.rule import Rule, Step, f32, i32, last_of
from vaani_jax.words import plural

Array = jax.Array

FAST = 1.5  # its speed after CALM calm steps
CALM = 20
SLOW = 0.25  # its speed at a step that is not calm
SETTING = "warmup_steps"


@flax.struct.dataclass
class WarmupState:
    """``ramp``: share of it that is done, float32; ``steps`` that it took, int32."""

    ramp: Array
    steps: Array


class Warmup(Rule):
    """Sets how fast the learning rate comes up to the schedule."""

    def init(self) -> WarmupState:
        return WarmupState(ramp=f32(1 / max(1, self.setup.warmup_steps)), steps=i32(1))

    def factor(self, state: WarmupState) -> Array:
        return state.ramp

    def observe(self, state: WarmupState, step: Step) -> WarmupState:
        speed = jnp.where(step.calm, 1.0, self.setup.factor(SLOW))
        speed = jnp.where(step.calm_steps > CALM, self.setup.factor(FAST), speed)
        ramp = state.ramp + speed / max(1, self.setup.warmup_steps)
        return WarmupState(jnp.minimum(ramp, 1.0), state.steps + (state.ramp < 1))

    def adjust(
        self, state: WarmupState, memory: Memory, seen: Summary
    ) -> tuple[WarmupState, tuple[Array, Array]]:
        """What is told: whether it is over, and the steps it has taken so far."""
        del memory, seen
        return state, (state.ramp >= 1, state.steps)

    def tell(self, step: int, change: tuple[Array, Array], journal: Journal) -> None:
        over, steps = change
        planned = self.setup.warmup_steps
        if bool(over) and planned and last_of(journal.events, SETTING) is None:
            cause = "the warm-up is over"
            journal.record(step, SETTING, cause, planned, int(steps))

    def summary(self, events: Sequence[Event]) -> list[str]:
        event = last_of(events, SETTING)
        if event is None:
            return []
        steps = plural(event["new"], "step")
        return [f"warm-up of {steps} (planned {event['old']})"]
