"""The training loop."""

import contextlib
import math
import pathlib
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from rich.console import Console

from vaani_jax import __version__
from vaani_jax.data.sources import as_json
from vaani_jax.devices import processes
from vaani_jax.devices.memory import keep_freed_memory
from vaani_jax.devices.mesh import make_mesh, place, place_parts
from vaani_jax.errors import VaaniError
from vaani_jax.evaluate.loss import Evaluation
from vaani_jax.files import without_trace
from vaani_jax.paths import local
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.runs.lock import locked
from vaani_jax.runs.metadata import Metadata
from vaani_jax.runs.workdir import Workdir
from vaani_jax.train.clock import Clock
from vaani_jax.train.config import Config
from vaani_jax.train.display import Display
from vaani_jax.train.guard import Guard, Metrics, make_guard
from vaani_jax.train.report import Report
from vaani_jax.train.start import Start, starting
from vaani_jax.train.state import TrainState, to_items
from vaani_jax.train.watch import Watch
from vaani_jax.words import cause_on_disk, duration, first_line


class Callback:
    """What a test or a notebook hooks into a run; override what you need.

    What it raises ends the run as it stands: the last checkpoint is whole, and the next
    session resumes from it. Time spent in `on_boundary` is no time of training. With
    several processes, it is called in each.
    """

    def on_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """A step is done, and another one, or nothing, runs already.

        Args:
          step: steps done, this one included.
          metrics: scalars by name, such as ``train/loss``, on the device: what is not
            asked for is not fetched, and ``float(metrics["train/loss"])`` waits for
            nothing. With a tuner, a step that was skipped is among them, too.
        """

    def on_boundary(self, step: int, evaluation: Evaluation | None) -> None:
        """An evaluation, a checkpoint or a sample was due, and is done.

        Args:
          step: steps done.
          evaluation: None where none was due, or the run was stopped within it.
        """


@contextlib.contextmanager
def _output(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where this process writes what it tells: the first one's is kept."""
    if processes.is_first():
        yield workdir
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)


def train(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    command: str = "",
    console: Console | None = None,
    stop: Callable[[], bool] = lambda: False,
    callbacks: Sequence[Callback] = (),
) -> Evaluation | None:
    """Trains, or goes on training.

    Args:
      config: the run.
      workdir: receives everything; a run that is already there is resumed.
      command: what to tell people to type to go on; empty for a general line.
      console: where people look.
      stop: asked between steps, besides signals; yes ends the run as they do.
      callbacks: called at steps and at boundaries, in this order.

    Returns:
      The evaluation at the end; None where the run was stopped before it.

    Raises:
      VaaniError: a problem that the user can mend; the last checkpoint is whole.
    """
    console = console or Console()
    keep_freed_memory()
    workdir = local(workdir, "the workdir")
    mesh = make_mesh(config.mesh)
    if not processes.is_first():
        # The same program everywhere; what it tells is kept and shown once.
        console = Console(quiet=True)

    def say(message: str) -> None:
        # Rich leaves with status 1 where the reader of a pipe has left.
        with contextlib.suppress(OSError, ValueError, SystemExit):
            console.print(message, highlight=False, soft_wrap=True, markup=False)

    with (
        without_trace(Workdir(workdir).checkpoints),
        jax.set_mesh(mesh),
        _output(workdir) as output,
        processes.peers(),
        _owned(workdir, say) as alive,
        Watch(say, alive).watching() as watch,
        starting(config, workdir, mesh, say) as start,
    ):
        step = start.progress.step
        display = Display(console, start.num_steps, step)
        clock = Clock(start.progress.elapsed)
        with (
            contextlib.closing(make_guard(start, output, display, clock)) as guard,
            contextlib.closing(Report(start, output, display, clock, guard)) as report,
        ):
            report.announce()
            if step >= start.num_steps:
                report.completed()
                say(
                    f"this run is done ({step:,} of {start.num_steps:,} steps): raise"
                    " --config.num_steps to go on, or choose another --workdir"
                )
                return None
            ask = processes.Agreement(lambda: watch() or stop())
            loop = Loop(start, display, clock, guard, report, ask, callbacks, watch)
            with display, jax.transfer_guard("disallow"), watch.during("a step"):
                step = loop.run()
                if step < start.num_steps:
                    report.stopped(step, command)
                    return None
            with watch.during("the results"):
                report.finished(loop.final)
            return loop.final


@contextlib.contextmanager
def _owned(
    workdir: pathlib.Path, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Owns the workdir, as the first process does for all; gives the sign of life."""
    if not processes.is_first():
        yield lambda: None
        return
    try:
        owned = locked(workdir, say)
        lock = owned.__enter__()
    except OSError as error:
        raise VaaniError(
            f"can't write to {workdir}: {error.strerror or error}. Make room there, or"
            " choose another --workdir"
        ) from None
    try:
        yield lock.touch
    finally:
        owned.__exit__(None, None, None)


class Loop:
    """Takes the steps of a run, and stops where something is due.

    Nothing is read back from the device for the step just dispatched: one step runs
    while the one before it is looked at.

    Attributes:
      state: after the last step dispatched.
      final: the evaluation at the end of the run; None before it.
    """

    def __init__(
        self,
        start: Start,
        display: Display,
        clock: Clock,
        guard: Guard,
        report: Report,
        stop: processes.Agreement,
        callbacks: Sequence[Callback],
        watch: Watch,
    ) -> None:
        self.state = start.state
        self.final: Evaluation | None = None
        self._start = start
        self._display = display
        self._clock = clock
        self._guard = guard
        self._report = report
        self._stop = stop
        self._callbacks = callbacks
        self._watch = watch
        self._compiled = False

    def run(self) -> int:
        """Trains to the end, or until told to stop; returns the steps done."""
        start, guard, report = self._start, self._guard, self._report
        step, end = start.progress.step, start.num_steps
        running: Metrics | None = None
        self._clock.restart()
        if step == 0:
            with self._watch.during("the range test of the tuner"):
                self.state = guard.begin(self.state, self._take_step, self._stop)
        while step < end and not self._stop():
            with self._watch.during(self._stage):
                self.state, metrics = self._take_step(step, self.state)
            step += 1
            self.state = guard.dispatched(step, self.state, metrics)
            report.window.append(metrics)
            if running is not None:
                self._look_at(step - 1, running)
            running = metrics
            report.flush()
            if step % start.config.log_interval == 0 or step == end:
                self._stop.settle()
                self.state, stats = start.program.report_step(self.state)
                report.due(step, stats)
            if self._is_boundary(step):
                report.flush()
                self._look_at(step, running)
                guard.check_loss(step, running["train/loss"])
                running = None
                with self._clock.pause(self.state):
                    self._at_boundary(step)
        if step < end:
            report.flush()
            if running is not None:
                self._look_at(step, running)
            self._save(step, None)
        with self._watch.during("a checkpoint"), _writing(start.checkpoints):
            start.checkpoints.wait()
        return step

    @property
    def _stage(self) -> str:
        return "a step" if self._compiled else "the compilation of the first step"

    def _take_step(self, step: int, state: TrainState) -> tuple[TrainState, Metrics]:
        """Dispatches the step after ``step``; its metrics are on the device."""
        tokens = self._batch(step)
        began = time.perf_counter()
        state, metrics = self._start.program.train_step(state, tokens)
        if not self._compiled:
            self._compiled = True
            metrics["train/loss"].block_until_ready()
            spent = duration(time.perf_counter() - began)
            self._display.say(f"first step done after {spent} of compilation")
            self._clock.restart(-1)
        return state, metrics

    def _batch(self, step: int) -> jax.Array:
        """The tokens of a step; each process reads the rows of its own devices."""
        batches, sharding = self._start.data.batches, self._start.program.batch
        if jax.process_count() == 1:
            return jax.device_put(batches.batch_at(step), sharding)
        config = self._start.config
        shape = (config.batch_size, config.model.max_seq_len + 1)
        return place_parts(
            shape, sharding, lambda index: batches.batch_at(step, index[0])
        )

    def _look_at(self, step: int, metrics: Metrics) -> None:
        """Takes in a step that is done, or soon will be."""
        metrics["train/loss"].block_until_ready()
        self.state = self._guard.settle(step, self.state)
        with jax.transfer_guard("allow"):
            for callback in self._callbacks:
                callback.on_step(step, types.MappingProxyType(metrics))

    # -- Boundaries --------------------------------------------------------------------

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self._start.num_steps or bool(interval and step % interval == 0)

    def _is_boundary(self, step: int) -> bool:
        config = self._start.config
        intervals = config.eval_interval, config.save_interval, config.sample_interval
        return any(self._is_due(step, interval) for interval in intervals)

    def _at_boundary(self, step: int) -> None:
        """Does what is due at this step: evaluates, saves, samples."""
        config, report = self._start.config, self._report
        if step == self._start.num_steps:
            self._guard.check_end(self.state)
        result = None
        if self._is_due(step, config.eval_interval):
            result = self._evaluate(step)
        if self._is_due(step, config.save_interval) or (
            result is not None and report.is_best(step)
        ):
            self._save(step, result)
        if self._is_due(step, config.sample_interval) and not self._stop():
            with self._watch.during("samples"):
                report.sample(step, self.state)
        report.write_history()
        if step == self._start.num_steps:
            self.final = result
        with jax.transfer_guard("allow"):
            for callback in self._callbacks:
                callback.on_boundary(step, result)

    def _evaluate(self, step: int) -> Evaluation | None:
        """Evaluates the state, rescued if need be; None where told to stop."""
        program = self._start.program
        with self._watch.during("an evaluation"):
            result = self._start.data.validation.evaluate(
                program.eval_step,
                self.state.variables,
                self._stop,
                lambda array: place(array, program.batch),
                whole=step == self._start.num_steps,
            )
        if result is None:
            return None
        # Far worse than guessing, or not a number: the weights are at fault, whatever
        # the guard has seen of it so far. A single token is guessed with a loss of 0.
        if not result.loss < 10 * math.log(max(2, self._start.config.model.vocab_size)):
            self.state = self._guard.see_lost_evaluation(step, self.state, result.loss)
            return self._evaluate(step)
        self.state = self._guard.see_evaluation(step, self.state, result.comparable)
        self._report.evaluation(step, result)
        return result

    def _save(self, step: int, result: Evaluation | None) -> None:
        start, report = self._start, self._report
        run = start.config.to_dict()
        for name in ("model", "quantization"):
            del run[name]
        metadata = Metadata(
            version=__version__,
            architecture=start.config.model,
            quantization=start.config.quantization,
            stacked=start.config.execution.scan_layers,
            tokenizer=start.data.tokenizer.to_json(),
            corpus=as_json(start.data.corpus),
            run=run,
            elapsed_seconds=self._clock.elapsed,
            best=report.best,
            window=tuple(
                {key: float(value) for key, value in metrics.items()}
                for metrics in jax.device_get(report.window)
            ),
        )
        loss = None if result is None else result.comparable
        with self._watch.during("a checkpoint"), _writing(start.checkpoints):
            items = to_items(self.state)
            start.checkpoints.save(step, items, metadata.to_json(), loss=loss)


@contextlib.contextmanager
def _writing(checkpoints: Checkpoints) -> Iterator[None]:
    """Says in one line what kept a checkpoint from being written."""
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many types
        if processes.is_peer_error(error):
            raise
        reason = cause_on_disk(error) or first_line(error)
        raise VaaniError(
            f"can't write a checkpoint to {checkpoints.directory}: {reason}. The"
            " checkpoints before it are whole: make room, and run the same command"
            " again"
        ) from error
