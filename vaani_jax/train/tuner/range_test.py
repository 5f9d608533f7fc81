"""Before the first step, a range test finds the peak of the learning rate.

L. N. Smith, arXiv:1506.01186: the learning rate rises exponentially over a few steps on
a throw-away copy of the state, and the peak of the schedule is read off the losses.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import Memory
from vaani_jax.train.tuner.rule import Rule, f32, last_of

Array = jax.Array

STEPS_MIN = 20  # fewer than these: no range test
LOW, HIGH = 1e-5, 1.0  # learning rates that it begins and ends with
# Share of the range test's whole drop of the loss; the learning rate where it is
# reached is the one that is read.
DROP = 0.5
GAIN = 4.5  # the peak over that learning rate, for a test of ``probe_share``
# How the peak falls with the length of a run whose test is shorter than that share:
# about 1/3 in arXiv:2409.19913.
EXPONENT = 1 / 3
# Factor around the picked peak within which a learning rate that the user gave is kept.
TRUST = 2.0


@flax.struct.dataclass
class RangeTestState:
    """Float32 scalars.

    Attributes:
      peak: of the learning rate.
      held: learning rate applied as it is, while the range test runs; else 0.
    """

    peak: Array
    held: Array


class RangeTest(Rule):
    """Sets the peak, once."""

    def init(self) -> RangeTestState:
        return RangeTestState(peak=f32(self.setup.learning_rate), held=f32(0))

    def factor(self, state: RangeTestState) -> Array:
        return state.peak

    def rescued(self, state: RangeTestState, memory: Memory) -> RangeTestState:
        return dataclasses.replace(state, held=f32(0))

    def rates(self, num_steps: int) -> list[float]:
        """Learning rates of the test of a run; empty where that is too short."""
        c = self.setup.config
        n = min(c.probe_steps, int(num_steps * c.probe_share))
        if n < STEPS_MIN:
            return []
        growth = math.log(HIGH / LOW) / (n - 1)
        return [LOW * math.exp(growth * i) for i in range(n)]

    def pick(
        self, rates: Sequence[float], losses: Sequence[float], num_steps: int
    ) -> float | None:
        """Reads the peak of the schedule off a range test.

        The point half way down the flank of the curve is the best determined one: the
        minimum and the edge of divergence beyond it move with every batch. A longer
        test reaches it at a lower learning rate, as longer runs want lower ones.
        Measured on one small character model, tests of 30 and 100 steps find it at
        about a quarter of the best peak of a run twenty times as long, with Muon, and
        with AdamW at 100.

        Args:
          rates: learning rates, rising.
          losses: each before its learning rate is applied; may end in non-finite ones.
          num_steps: of the run.

        Returns:
          None where the losses show no drop beyond their noise.
        """
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        reach = 1 if len(rates) < 50 else 2  # a median of three, or five
        smooth = [
            statistics.median(finite[max(0, i - reach) : i + reach + 1])
            for i in range(len(finite))
        ]
        quiet = finite[: max(3, len(rates) // 3)]  # too low a rate to move anything
        start = statistics.median(quiet)
        noise = max(abs(value - start) for value in quiet)
        drop = start - min(smooth)
        if not math.isfinite(start) or drop <= 2 * noise:
            return None
        target = start - DROP * drop
        after = next(i for i, loss in enumerate(smooth) if loss <= target)
        before = max(0, after - 1)
        share = 1.0
        if smooth[before] > smooth[after]:
            share = (smooth[before] - target) / (smooth[before] - smooth[after])
        read = rates[before] * (rates[after] / rates[before]) ** share
        whole = self.setup.config.probe_share * num_steps
        shorter = min(1.0, len(rates) / whole)
        return GAIN * read * shorter**EXPONENT

    def reconcile(self, given: float, picked: float | None) -> tuple[float, str]:
        """The peak to use, from the user's learning rate and the test's; and why."""
        if picked is None:
            return given, "the range test shows no slope to read"
        if picked / TRUST <= given <= picked * TRUST:
            return given, f"the range test agrees (it would take {picked:.2g})"
        return picked, f"the range test finds {given:.2g} far from the best"

    def tell_peak(self, cause: str, given: Any, peak: float, journal: Journal) -> None:
        """Writes and says which peak was taken before the first step."""
        journal.record(0, "learning_rate", cause, given, peak)
        same = given == peak
        journal.say(
            f"tuner   learning rate {peak:.3g}"
            + (" as given" if same else "")
            + f": {cause}"
        )

    def summary(self, events: Sequence[Event]) -> list[str]:
        event = last_of(events, "learning_rate")
        if event is None:
            return []
        return [f"peak learning rate {event['new']:.3g} ({event['cause']})"]
