"""The momentum of tracked activation ranges is high in calm, low after unrest."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import Memory, Summary
from vaani_jax.train.tuner.rule import Change, Rule, f32, i32, last_of

Array = jax.Array

LOWEST, HIGHEST = 0.9, 0.999
STEPS = 10.0  # after n calm steps the momentum is ``1 - m / (n + m)``
DEAD_BAND = 0.1  # least relative change of ``1 - momentum``
SETTING = "activation_momentum"


@flax.struct.dataclass
class MomentumState:
    """``value``: momentum applied, a float32 scalar; 0 where no range is tracked."""

    value: Array


class Momentum(Rule):
    """Sets the momentum, where ranges are tracked."""

    def init(self) -> MomentumState:
        return MomentumState(value=f32(self.setup.momentum or 0.0))

    def adjust(
        self, state: MomentumState, memory: Memory, seen: Summary
    ) -> tuple[MomentumState, Change]:
        del seen
        wanted = jnp.clip(
            1 - STEPS / (memory.calm.astype(jnp.float32) + STEPS), LOWEST, HIGHEST
        )
        moves = jnp.abs(wanted - state.value) > DEAD_BAND * (1 - state.value)
        tracked = self.setup.momentum is not None
        value = jnp.where(moves & tracked, wanted, state.value)
        return MomentumState(value), Change(state.value, value, i32(0))

    def tell(self, step: int, change: Change, journal: Journal) -> None:
        if change.moved:
            calm = "calm" if change.new > change.old else "not calm"
            cause = f"training is {calm}"
            journal.record(step, SETTING, cause, change.old, change.new)

    def summary(self, events: Sequence[Event]) -> list[str]:
        event = last_of(events, SETTING)
        return [f"activation momentum {event['new']:.3f} at last"] if event else []
