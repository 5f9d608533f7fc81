"""What watches over a run, and what it does when the run goes wrong.

A guard gets the state after every step and gives back the state to go on with, which is
another one after a rescue. An untuned run has a guard that only checks that numbers are
finite; a tuned one listens to `HyperparameterTuner`.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.devices.mesh import place
from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.train.clock import Clock
from vaani_jax.train.display import Display
from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.start import Start, first_state, restore
from vaani_jax.train.state import TrainState
from vaani_jax.train.tuner import HyperparameterTuner, explosion
from vaani_jax.train.tuner.divergence import CAUSES, STUCK
from vaani_jax.train.tuner.memory import RECENT, layer_labels
from vaani_jax.train.tuner.verdict import ACCEPTED, Verdict
from vaani_jax.words import times

Metrics = dict[str, jax.Array]
# Starts the step after so many: the state after it, and its metrics, on the device.
TakeStep = Callable[[int, TrainState], tuple[TrainState, Metrics]]


class Guard:
    """The guard of an untuned run: ends it where its loss is not finite."""

    def __init__(self, start: Start) -> None:
        self._config = start.config
        self._checkpoints = start.checkpoints

    def begin(
        self, state: TrainState, take_step: TakeStep, stop: Callable[[], bool]
    ) -> TrainState:
        """Readies the state before the first step of all.

        Args:
          state: of a new run.
          take_step: for steps on trial.
          stop: whether the run was told to.
        """
        del take_step, stop
        return state

    def dispatched(self, step: int, state: TrainState, metrics: Metrics) -> TrainState:
        """Takes its own out of the metrics of a step that has just been dispatched."""
        del step, metrics
        return state

    def settle(self, step: int, state: TrainState) -> TrainState:
        """Acts on what came of the steps up to ``step``, which are done."""
        del step
        return state

    def counted(self, values: np.ndarray) -> np.ndarray:
        """Those of a metric's values, one a step, that make up its mean."""
        return values

    def check_loss(self, step: int, loss: jax.Array | float) -> None:
        """Raises VaaniError where a loss, on the device or not, is not finite."""
        loss = float(jax.device_get(loss))
        if not math.isfinite(loss):
            raise self.diverged(step, f"the loss is {loss}")

    def check_end(self, state: TrainState) -> None:
        """Raises VaaniError where nothing came of the whole run."""
        del state

    def see_evaluation(self, step: int, state: TrainState, loss: float) -> TrainState:
        """Takes in a validation loss."""
        del step, loss
        return state

    def see_lost_evaluation(
        self, step: int, state: TrainState, loss: float
    ) -> TrainState:
        """Takes in a validation loss that no working model has."""
        del state
        raise self.diverged(step, f"the validation loss is {loss:.3g}")

    def diverged(self, step: int, what: str) -> VaaniError:
        """What to say of a run that can't go on."""
        self._checkpoints.wait()
        saved = self._checkpoints.steps()
        kept = f"step {saved[-1]}" if saved else "none was saved yet"
        return VaaniError(
            f"training diverged at step {step}: {what}. Last good checkpoint: {kept}."
            " Try a lower --config.learning_rate (it is"
            f" {self._config.learning_rate}) in a new --workdir"
        )

    @property
    def events(self) -> Sequence[Event]:
        """What was decided so far, for the curves."""
        return ()

    def summary(self) -> str:
        """What was decided, for people; empty where nothing decides."""
        return ""

    def close(self) -> None:
        """Closes what it writes."""


class TunedGuard(Guard):
    """The guard of a tuned run: does, and writes down, what the tuner decides."""

    def __init__(
        self,
        start: Start,
        tuner: HyperparameterTuner,
        output: pathlib.Path,
        display: Display,
        clock: Clock,
    ) -> None:
        super().__init__(start)
        self._tuner = tuner
        self._num_steps = start.num_steps
        self._program = start.program
        self._display = display
        self._clock = clock
        self._journal = Journal(output, start.progress.step, display.say)
        self._layers = layer_labels(start.state.tuner.memory.layer_norms)
        # What the tuner made of steps already dispatched, on the device.
        self._pending: list[tuple[int, Any]] = []
        self._lost_at = -1

    @property
    def events(self) -> Sequence[Event]:
        return self._journal.events

    def summary(self) -> str:
        return self._tuner.summary(self._journal.events)

    def close(self) -> None:
        self._journal.close()

    # -- The range test ----------------------------------------------------------------

    def begin(
        self, state: TrainState, take_step: TakeStep, stop: Callable[[], bool]
    ) -> TrainState:
        """Lets the tuner find, or check, the peak of the learning rate."""
        if self._config.init_from:
            # The weights are those of another run: flips are counted from their codes.
            memory = state.tuner.memory
            unused = memory.codes
            memory = memory.replace(codes=jax.tree.map(jnp.copy, state.codes))
            tuned = dataclasses.replace(state.tuner, memory=memory)
            state = dataclasses.replace(state, tuner=tuned)
            jax.tree.map(lambda leaf: leaf.delete(), unused)  # `start` refers to them
        tuner, given = self._tuner, self._config.learning_rate
        test, usual = tuner.range_test, tuner.range_test.setup.learning_rate
        rates = test.rates(self._num_steps)
        if not rates:
            if given == "auto":
                cause = "the usual one: too short a run for a range test"
                test.tell_peak(cause, given, usual, self._journal)
            return state
        kept = jax.tree.map(jnp.copy, state)
        losses = self._range_test(rates, state, take_step, stop)
        self._display.note("")
        self._clock.restart()
        if stop():  # nothing is decided: the next session begins again
            return kept
        picked = test.pick(rates, losses, self._num_steps)
        if given == "auto":
            peak, cause = picked, f"from a range test of {len(losses)} steps"
            if peak is None:
                peak = usual
                cause = "the usual one: the range test shows no slope to read"
        else:
            peak, cause = test.reconcile(given, picked)
        test.tell_peak(cause, given, peak, self._journal)
        return _with_range_test(kept, peak=self._number(peak))

    def _range_test(
        self,
        rates: Sequence[float],
        state: TrainState,
        take_step: TakeStep,
        stop: Callable[[], bool],
    ) -> list[float]:
        """Losses before each of the learning rates is applied; the last may lack."""
        losses: list[Any] = []
        for i, rate in enumerate(rates):
            state = _with_range_test(state, held=self._number(rate))
            state, metrics = take_step(i, state)
            losses.append(metrics["train/loss"])
            if i:
                losses[i - 1] = float(jax.device_get(losses[i - 1]))
                self._display.note(f"range test of the learning rate {i}/{len(rates)}")
                if not losses[i - 1] < 2 * losses[0]:
                    break
            if stop():
                break
        losses[-1] = float(jax.device_get(losses[-1]))
        return losses

    def _number(self, value: float) -> jax.Array:
        """A float32 scalar on every device."""
        return place(np.float32(value), self._program.everywhere)

    # -- Verdicts ----------------------------------------------------------------------

    def dispatched(self, step: int, state: TrainState, metrics: Metrics) -> TrainState:
        self._pending.append((step, metrics.pop("verdict")))
        if step % self._tuner.config.interval == 0:
            state, adjustment = self._program.adjust_step(state)
            self._pending.append((step, adjustment))
        return state

    def settle(self, step: int, state: TrainState) -> TrainState:
        while self._pending and self._pending[0][0] <= step:
            at, decided = self._pending.pop(0)
            if isinstance(decided, Verdict):
                if jax.device_get(decided.kind) != ACCEPTED:
                    verdict = jax.device_get(decided)
                    self._tuner.tell_verdict(at, verdict, self._layers, self._journal)
                continue
            decided = jax.device_get(decided)
            self._tuner.tell(at, decided, self._journal)
            diagnosis = decided["divergence"]
            if not diagnosis.healthy:
                state = self._rescue(at, state, diagnosis.cause)
        return state

    def counted(self, values: np.ndarray) -> np.ndarray:
        return values[np.isfinite(values)]  # the others were skipped

    def check_loss(self, step: int, loss: jax.Array | float) -> None:
        """Leaves it to the tuner to find a divergence."""

    def check_end(self, state: TrainState) -> None:
        # Too few skipped steps to lose patience may still have been all there were.
        if not int(jax.device_get(state.tuner.memory.count)):
            raise self.diverged(self._num_steps, CAUSES[STUCK])

    def see_evaluation(self, step: int, state: TrainState, loss: float) -> TrainState:
        tuned, change = self._program.see_evaluation(state.tuner, self._number(loss))
        change = jax.device_get(change)
        self._tuner.learning_rate.tell_evaluation(step, change, self._journal)
        return dataclasses.replace(state, tuner=tuned)

    def see_lost_evaluation(
        self, step: int, state: TrainState, loss: float
    ) -> TrainState:
        cause = f"the validation loss is {loss:.3g}"
        if self._lost_at == step:  # rescued, and no better
            raise self.diverged(step, cause)
        self._lost_at = step
        return self._rescue(step, state, cause)

    # -- Rescues -----------------------------------------------------------------------

    def _rescue(self, step: int, state: TrainState, cause: str) -> TrainState:
        """Goes back to the last good state, with a lower learning rate.

        Only the state goes back: steps and data go on, so that nothing is written twice
        and the batches that did it are not met again.
        """
        self._checkpoints.wait()
        rescues = int(jax.device_get(state.tuner.rules["divergence"].rescues_running))
        if rescues >= self._tuner.config.rescues_max:
            if rescues:
                often = times(rescues)
                cause += f", after going back {often} without a new lowest loss"
            raise self.diverged(step, cause)
        if step >= self._num_steps:
            raise self.diverged(step, f"{cause}, and no steps are left to go back")
        with self._clock.pause(state), jax.transfer_guard("allow"):
            tuned, now = self._tuner.rescued(state.tuner), state.step
            back_to, good = self._last_good_state(step)
            state = dataclasses.replace(
                good, step=now, tuner=jax.tree.map(jnp.copy, tuned)
            )
        # The steps dispatched since belong to the state that is gone.
        self._pending = []
        factor = float(jax.device_get(state.tuner.rules["learning_rate"].factor))
        self._tuner.divergence.tell_rescue(step, back_to, cause, factor, self._journal)
        return state

    def _last_good_state(self, step: int) -> tuple[int, TrainState]:
        """The newest state saved well before ``step``, after how many steps it was."""
        best = self._checkpoints.best_step()
        say = self._display.say
        # What noticing may have taken.
        margin = max(RECENT, explosion.PATIENCE) + self._tuner.config.interval
        for candidate in reversed(self._checkpoints.steps()):
            if candidate > step - margin and candidate != best:
                continue
            with contextlib.suppress(VaaniError):  # damaged, and said so
                restored = restore(
                    self._program, self._checkpoints, say, step=candidate
                )
                if restored is not None:
                    return restored[0], restored[1]
        source = None
        if self._config.init_from:
            source = load(self._config.init_from, notify=say)
        return 0, first_state(self._config, self._program, source, say)


def make_guard(
    start: Start, output: pathlib.Path, display: Display, clock: Clock
) -> Guard:
    """The guard that a run needs.

    Args:
      start: of the run.
      output: the folder that a tuner's journal goes to.
      display: tells people what is decided.
      clock: of training, which rescues are no part of.
    """
    tuner = start.program.tuner
    if tuner is None:
        return Guard(start)
    return TunedGuard(start, tuner, output, display, clock)


def _with_range_test(state: TrainState, **changes: Any) -> TrainState:
    tuned = state.tuner.with_rule("range_test", **changes)
    return dataclasses.replace(state, tuner=tuned)
