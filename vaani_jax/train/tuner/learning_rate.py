"""The factor on the schedule falls at signs of instability, and recovers in calm.

A validation loss that rises lowers its ceiling: the factor does not recover beyond it.
Where the loss rises on all the same, the learning rate was not the cause (the held-out
text may be of another kind): the ceiling goes back to where it was, and stays there
until there is a new lowest loss.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import RISE_SIGMA, SPIKE_RATIO, Memory, Summary
from vaani_jax.train.tuner.rule import Change, Rule, Step, f32, i32, last_of
from vaani_jax.words import times

Array = jax.Array

CUT = 0.7  # factor at a sign of instability, once per ``cooldown``
RECOVERY = 1.1  # factor per calm interval, back up to the ceiling
FACTOR_MIN = 0.1  # lowest factor on the schedule, without rescues
RESCUE_CUT = 0.5  # factor after going back, for good
FLIP_RATIO = 4.0  # codes that flip in a step, over their running mean, that are a sign
# Share by which validation loss must exceed its lowest, at two evaluations running, for
# the ceiling to be cut; and at two more, for the cut to be taken back.
OVERFIT_RISE = 0.02
EVALUATIONS = 2

# Values of `LearningRateState.risen` after a cut, until there is a new lowest loss; it
# falls by one with every evaluation that exceeds the lowest.
TRYING = -1
RESTING = TRYING - EVALUATIONS

# Causes of a change.
CALM, SKIPS, LOSS, GRADIENTS, FLIPS = range(5)
CAUSES = (
    "training is calm",
    "steps were skipped",
    "the loss rises",
    "gradient norms rise",
    "codes flip more",
)
SETTING = "learning_rate_factor"

# What a validation loss led to.
CUT_BACK, TAKEN_BACK = 1, 2
SEEN = {
    CUT_BACK: "validation loss rises",
    TAKEN_BACK: "validation loss rises all the same: the cut for it is taken back",
}


@flax.struct.dataclass
class LearningRateState:
    """Float32 and int32 scalars.

    Attributes:
      factor, ceiling: on the schedule, and the largest that it may recover to.
      since_cut: steps since the factor was cut.
      skipped_before: steps skipped in all, at the last adjustment.
      best_evaluation, risen: lowest validation loss; evaluations running above it, or
        what became of a cut (see `TRYING`).
    """

    factor: Array
    ceiling: Array
    since_cut: Array
    skipped_before: Array
    best_evaluation: Array
    risen: Array


class LearningRate(Rule):
    """Sets the factor on the schedule."""

    def init(self) -> LearningRateState:
        return LearningRateState(
            factor=f32(1),
            ceiling=f32(1),
            since_cut=i32(self.setup.config.cooldown),
            skipped_before=i32(0),
            best_evaluation=f32(jnp.inf),
            risen=i32(0),
        )

    def factor(self, state: LearningRateState) -> Array:
        return state.factor

    def observe(self, state: LearningRateState, step: Step) -> LearningRateState:
        return dataclasses.replace(state, since_cut=state.since_cut + 1)

    def adjust(
        self, state: LearningRateState, memory: Memory, seen: Summary
    ) -> tuple[LearningRateState, Change]:
        skipped = memory.skipped - state.skipped_before
        rises = seen.recent - seen.older > RISE_SIGMA * seen.error
        signs = [
            (SKIPS, skipped > 1),  # one bad batch says nothing of the learning rate
            (LOSS, seen.full & rises),
            (GRADIENTS, seen.recent_gradient > SPIKE_RATIO * seen.gradient_median),
            (
                FLIPS,
                (memory.flip_rate > 0) & (seen.flipped > FLIP_RATIO * memory.flip_rate),
            ),
        ]
        cause = i32(CALM)
        for index, sign in reversed(signs):
            cause = jnp.where(sign, index, cause)
        config = self.setup.config
        cut = (cause != CALM) & (state.since_cut >= config.cooldown)
        lower = jnp.maximum(
            state.factor * self.setup.factor(CUT),
            jnp.minimum(FACTOR_MIN, state.factor),
        )
        recovered = jnp.minimum(
            state.factor * self.setup.factor(RECOVERY), state.ceiling
        )
        calm = (cause == CALM) & (memory.calm >= config.interval)
        factor = jnp.where(cut, lower, jnp.where(calm, recovered, state.factor))
        change = Change(state.factor, factor, cause)
        state = dataclasses.replace(
            state,
            factor=factor,
            since_cut=jnp.where(cut, 0, state.since_cut),
            skipped_before=memory.skipped,
        )
        return state, change

    def see_evaluation(
        self, state: LearningRateState, loss: Array
    ) -> tuple[LearningRateState, Change]:
        """Takes in a validation loss; the change's cause is one of `SEEN`."""
        best, before = state.best_evaluation, state.risen
        rises = loss > best * (1 + OVERFIT_RISE)
        counting = jnp.where(rises, before + 1, 0)
        trying = jnp.where(rises, jnp.maximum(before - 1, RESTING), before)
        risen = jnp.where(before >= 0, counting, trying)
        risen = jnp.where(loss < best, 0, risen)
        lower = state.ceiling * self.setup.factor(CUT)
        cut = (risen >= EVALUATIONS) & (lower >= FACTOR_MIN)
        back = (before > RESTING) & (risen == RESTING)
        higher = jnp.minimum(state.ceiling / self.setup.factor(CUT), 1.0)
        ceiling = jnp.where(cut, lower, jnp.where(back, higher, state.ceiling))
        factor = jnp.minimum(state.factor, ceiling)
        cause = jnp.where(cut, CUT_BACK, jnp.where(back, TAKEN_BACK, 0))
        change = Change(state.factor, factor, cause.astype(jnp.int32))
        state = dataclasses.replace(
            state,
            best_evaluation=jnp.minimum(best, loss),
            risen=jnp.where(cut, TRYING, risen),
            ceiling=ceiling,
            factor=factor,
        )
        return state, change

    def rescued(self, state: LearningRateState, memory: Memory) -> LearningRateState:
        ceiling = state.ceiling * self.setup.factor(RESCUE_CUT)
        return dataclasses.replace(
            self.init(),
            factor=ceiling,
            ceiling=ceiling,
            skipped_before=memory.skipped,
            best_evaluation=state.best_evaluation,
        )

    def tell(self, step: int, change: Change, journal: Journal) -> None:
        if change.moved:
            cause = int(change.cause)
            self._tell(step, change, CAUSES[cause], journal, aloud=cause != CALM)

    def tell_evaluation(self, step: int, change: Change, journal: Journal) -> None:
        """Writes and says what a validation loss changed."""
        if cause := int(change.cause):
            self._tell(step, change, SEEN[cause], journal, aloud=True)

    def _tell(
        self, step: int, change: Change, cause: str, journal: Journal, *, aloud: bool
    ) -> None:
        old, new = float(change.old), float(change.new)
        journal.record(step, SETTING, cause, old, new)
        if aloud:
            moved = f"x {new / old:.2f}" if new != old else "may recover"
            journal.say(f"step {step:>6,}  learning rate {moved}: {cause}")

    def summary(self, events: Sequence[Event]) -> list[str]:
        cuts = [e for e in events if e["setting"] == SETTING and e["new"] < e["old"]]
        last = last_of(events, SETTING)
        if last is None or not cuts:
            return ["it followed the schedule"]
        causes = Counter(e["cause"] for e in cuts)
        listed = ", ".join(f"{n} x {cause}" for cause, n in causes.items())
        return [
            f"it was cut {times(len(cuts))} ({listed}) and stood at {last['new']:.2f}"
            " of the schedule at last"
        ]
