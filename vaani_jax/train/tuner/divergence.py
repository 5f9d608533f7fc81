"""A run that has lost most of what it reached, or can't go on, is a divergence.

The loss has left what was reached, or no step can be applied any more: the run then
goes back to its last good state (see `train.guard`), with a lower learning rate.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner import explosion
from vaani_jax.train.tuner.memory import RECENT, Memory, Summary
from vaani_jax.train.tuner.rule import Rule, Step, f32, i32
from vaani_jax.words import times

Array = jax.Array

SHARE = 0.3  # of the loss's whole drop, that must be lost again
FLOOR = 0.2  # least rise of the loss, as a share of it
RATIO = 10.0  # loss over that of the first step that is one in any case

# Causes of going back.
HEALTHY, LOST, STUCK = range(3)
CAUSES = ("healthy", "the loss left what was reached", "no step can be applied")


@flax.struct.dataclass
class DivergenceState:
    """Float32 and int32 scalars.

    Attributes:
      first: loss of the first step; inf before it.
      lowest, record: lowest smoothed loss since the last rescue, and of all; inf where
        unset.
      rescues, rescues_running: in all; since the last record.
    """

    first: Array
    lowest: Array
    record: Array
    rescues: Array
    rescues_running: Array


@flax.struct.dataclass
class Diagnosis:
    """``kind``: HEALTHY, LOST or STUCK; smoothed ``loss``, and that at its lowest."""

    kind: Array
    loss: Array
    lowest: Array

    @property
    def healthy(self) -> bool:
        return int(self.kind) == HEALTHY

    @property
    def cause(self) -> str:
        """In words; of a fetched one."""
        words = CAUSES[int(self.kind)]
        if int(self.kind) == LOST:
            words += f" (loss {self.loss:.3f}, at its lowest {self.lowest:.3f})"
        return words


class Divergence(Rule):
    """Finds a divergence."""

    def init(self) -> DivergenceState:
        inf = jnp.inf
        return DivergenceState(
            first=f32(inf),
            lowest=f32(inf),
            record=f32(inf),
            rescues=i32(0),
            rescues_running=i32(0),
        )

    def observe(self, state: DivergenceState, step: Step) -> DivergenceState:
        begins = step.accepted & jnp.isinf(state.first)
        first = jnp.where(begins, step.loss, state.first)
        return dataclasses.replace(state, first=first)

    def adjust(
        self, state: DivergenceState, memory: Memory, seen: Summary
    ) -> tuple[DivergenceState, Diagnosis]:
        recent, settling = seen.recent, seen.settling
        has_recent = memory.count >= RECENT
        lowest = jnp.where(settling, recent, jnp.minimum(state.lowest, recent))
        lowest = jnp.where(has_recent, lowest, state.lowest)
        rise = jnp.maximum(
            SHARE * jnp.maximum(state.first - lowest, 0.0), FLOOR * lowest
        )
        lost = (recent - lowest > rise) | (recent > RATIO * state.first)
        lost = has_recent & lost
        kind = jnp.where(
            memory.running >= explosion.PATIENCE, STUCK, jnp.where(lost, LOST, HEALTHY)
        )
        record = jnp.where(settling, lowest, jnp.minimum(state.record, lowest))
        running = jnp.where(record < state.record, 0, state.rescues_running)
        state = dataclasses.replace(
            state, lowest=lowest, record=record, rescues_running=running
        )
        return state, Diagnosis(kind.astype(jnp.int32), recent, lowest)

    def rescued(self, state: DivergenceState, memory: Memory) -> DivergenceState:
        return dataclasses.replace(
            state,
            lowest=f32(jnp.inf),
            rescues=state.rescues + 1,
            rescues_running=state.rescues_running + 1,
        )

    def tell_rescue(
        self, step: int, back_to: int, cause: str, factor: float, journal: Journal
    ) -> None:
        """Writes and says that the run went back to the state of ``back_to``."""
        more = {"learning_rate_factor": factor}
        journal.record(step, "state", cause, step, back_to, **more)
        journal.say(
            f"step {step:>6,}  rescued: {cause}; back to the state of step"
            f" {back_to:,}, learning rate x {factor:.3g} of the schedule from here on"
        )

    def summary(self, events: Sequence[Event]) -> list[str]:
        count = sum(event["setting"] == "state" for event in events)
        return [f"rolled back {times(count)}"] if count else []
