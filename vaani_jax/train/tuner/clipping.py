"""The clipping threshold follows a percentile of past gradient norms.

As arXiv:2007.14469 has it; it is never above what the config says.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import RECENT, Memory, Summary, finite_percentile
from vaani_jax.train.tuner.rule import Change, Rule, f32, i32, last_of

Array = jax.Array

MARGIN = 1.5  # clipping threshold over that percentile
RANGE = 10.0  # how far below the configured threshold it may come, a factor
DEAD_BAND = 0.1  # least relative change


@flax.struct.dataclass
class ClippingState:
    """``norm``: clipping threshold applied, a float32 scalar."""

    norm: Array


class Clipping(Rule):
    """Sets the clipping threshold."""

    def init(self) -> ClippingState:
        return ClippingState(norm=f32(self.setup.clip_norm))

    def adjust(
        self, state: ClippingState, memory: Memory, seen: Summary
    ) -> tuple[ClippingState, Change]:
        del seen
        highest = self.setup.clip_norm
        wanted = MARGIN * finite_percentile(
            memory.gradient_norms, self.setup.config.clip_percentile
        )
        wanted = jnp.clip(wanted, highest / RANGE, highest)
        moves = jnp.abs(wanted - state.norm) > DEAD_BAND * state.norm
        norm = jnp.where(moves & (memory.count >= RECENT), wanted, state.norm)
        return ClippingState(norm), Change(state.norm, norm, i32(0))

    def tell(self, step: int, change: Change, journal: Journal) -> None:
        if change.moved:
            cause = "percentile of past gradient norms"
            journal.record(step, "clip_norm", cause, change.old, change.new)

    def summary(self, events: Sequence[Event]) -> list[str]:
        event = last_of(events, "clip_norm")
        return [f"gradients clipped at {event['new']:.3g} at last"] if event else []
