"""The training loop: the only module that knows everything."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from vaani_jax import __version__
from vaani_jax.data.batches import Batches
from vaani_jax.data.corpus import make_tokenizer, split_tokens
from vaani_jax.data.sources import Corpus, as_json, load_corpus
from vaani_jax.devices import processes
from vaani_jax.devices.memory import keep_freed_memory
from vaani_jax.devices.mesh import batch_parts, make_mesh, place, place_parts
from vaani_jax.errors import VaaniError
from vaani_jax.evaluate.loss import Evaluation, validation_set
from vaani_jax.files import write_atomically
from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import LoadedModel, load_model
from vaani_jax.model.size import model_size
from vaani_jax.model.transformer import stack_layers, unrolled
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.runs.curves import plot_curves
from vaani_jax.runs.metadata import Metadata
from vaani_jax.runs.metrics import MetricWriter, Row
from vaani_jax.settings import differences
from vaani_jax.text.tokenizers import Tokenizer, from_json
from vaani_jax.train.config import Config, config_of
from vaani_jax.train.display import Display
from vaani_jax.train.journal import Journal
from vaani_jax.train.program import make_program
from vaani_jax.train.state import TrainState
from vaani_jax.train.tuner import (
    ACCEPTED,
    DIVERGENCES,
    HEALTHY,
    LOST,
    RECENT,
    STUCK,
    Verdict,
    layer_labels,
    pick_learning_rate,
    reconcile,
)
from vaani_jax.words import duration, size

Notify = Callable[[str], None]


# Keys that a resumed run may change: they don't touch what is computed.
FREE_KEYS = (
    "num_steps",
    "num_epochs",
    "eval_interval",
    "save_interval",
    "log_interval",
    "sample_interval",
    "keep_checkpoints",
    "data.path",  # the corpus itself is compared instead
    "data.data_dir",
    "data.fallback",
    "data.download_timeout",
    "data.download_attempts",
    "mesh.",
    "model.operands",
    "model.wire",
    "sample.",
)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question that the loop asks.

    A second Ctrl-C interrupts at once.
    """
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever runs us handles signals
        pass
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    command: str = "",
    console: Console | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Trains, or goes on training.

    Args:
      config: the run.
      workdir: receives everything; a run that is already there is resumed.
      command: what to tell people to type to go on; empty for a general line.
      console: where people look.
      stop: asked between steps, besides signals; yes ends the run as they do.

    Returns:
      The evaluation at the end; None where the run was stopped before it.

    Raises:
      VaaniError: a problem that the user can mend; the last checkpoint is whole.
    """
    console = console or Console()
    keep_freed_memory()
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(config.mesh)
    if not processes.is_first():
        # The same program everywhere; what it tells is kept and shown once.
        console = Console(quiet=True)

    with (
        _stop_signals() as signalled,
        jax.set_mesh(mesh),
        contextlib.ExitStack() as stack,
        processes.peers(),
    ):
        output = workdir
        if not processes.is_first():
            output = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ask = processes.Agreement(lambda: signalled() or stop())
        trainer = Trainer(config, workdir, output, mesh, console, ask, command)
        try:
            return trainer.run()
        finally:
            trainer.close()


@dataclasses.dataclass
class _Report:
    """Metrics on the device, to be fetched while a later step runs."""

    step: int
    metrics: list[dict[str, Any]]
    stats: dict[str, Any]


class Trainer:
    """One run, as one of its processes sees it; see `train`."""

    journal: Journal | None = None

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        output: pathlib.Path,
        mesh: Mesh,
        console: Console,
        stop: processes.Agreement,
        command: str,
    ) -> None:
        """Prepares a run.

        Args:
          config, workdir, console, command: see `train`.
          output: where this process writes what it tells; ``workdir`` in the first.
          mesh: the devices; it must be set.
          stop: whether the run was told to.
        """
        self.workdir = workdir
        self.output = output
        self.mesh = mesh
        self.console = console
        self.stop = stop
        self.command = command
        self.writer: MetricWriter | None = None
        corpus = load_corpus(config.data, self.say)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", keep=config.keep_checkpoints
        )
        try:
            self._prepare(config, corpus)
        except BaseException:
            self.close()
            raise

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    # -- Setting up ---------------------------------------------------------------

    def _prepare(self, config: Config, corpus: Corpus) -> None:
        if config.model.weight_scale == "stored":
            raise VaaniError(
                "model.weight_scale = stored is for imported models only: train with"
                " absmean"
            )
        found = self._newest_meta()
        source = None
        if found is not None:
            self.tokenizer = from_json(found.tokenizer)
        elif config.init_from:
            source = load_model(config.init_from, notify=self.say)
            self.tokenizer = source.tokenizer
        else:
            self.tokenizer = make_tokenizer(config.data, corpus)
        self.config = config = _with_vocabulary(config, self.tokenizer)
        if found is not None:
            self._check_fit(found, corpus)
        self.corpus = corpus
        model = config.model
        split = split_tokens(config.data, corpus, self.tokenizer, model.max_seq_len)
        self.batches = Batches(
            split.train,
            seq_len=model.max_seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.validation = validation_set(
            model.max_seq_len, split, self.tokenizer, batch_parts(self.mesh)
        )
        steps = config.num_steps
        self.num_steps = steps or config.num_epochs * self.batches.steps_per_epoch
        self.tokens_per_step = config.batch_size * model.max_seq_len
        self.program = program = make_program(config, self.mesh, self.num_steps)
        self.tuner = program.tuner
        # What a checkpoint is read as, on whatever mesh it was written.
        self.target = _items(program.shapes)
        self.elapsed = 0.0
        self.best: dict[str, float] | None = None
        # Metrics of the steps since the last report, on the device or fetched.
        self.window: list[dict[str, Any]] = []
        restored = self.checkpoints.restore(
            lambda meta: self.target,
            notify=self.say,
            set_aside=True,
        )
        if restored is not None:
            self.state = TrainState(
                **restored.items["model"], **restored.items["training"]
            )
            saved = Metadata.from_json(restored.meta)
            self.elapsed = saved.elapsed_seconds
            self.best = saved.best
            self.window = list(saved.window)
            self.start = restored.step
        else:
            self.state = self._first_state(source)
            self.start = 0
        # What the tuner made of steps already dispatched, on the device.
        self.pending: list[tuple[int, Any]] = []
        if self.tuner is not None:
            self.journal = Journal(self.output, self.start, self.say)
            self.layers = layer_labels(self.state.tuner.layer_norms)
        self.writer = MetricWriter(self.output, self.start)
        self._announce(len(split.train), restored is not None)

    def _newest_meta(self) -> Metadata | None:
        """Metadata of the newest checkpoint whose metadata can be read."""
        for step in reversed(self.checkpoints.steps()):
            try:
                return Metadata.from_json(self.checkpoints.meta(step))
            except Exception:  # damaged: `restore` will say so
                continue
        return None

    def _check_fit(self, meta: Metadata, corpus: Corpus) -> None:
        if meta.corpus is None:
            raise VaaniError(
                f"{self.workdir} holds an imported model: train from it with"
                f" --config.init_from={self.workdir} and another --workdir"
            )
        changed = {
            key: values
            for key, values in differences(
                # Through Config, so that keys younger than the run have a value.
                config_of(meta).to_dict(),
                self.config.to_dict(),
            ).items()
            if not key.startswith(FREE_KEYS)
        }
        if changed:
            listed = "; ".join(
                f"{key} is {old!r} there, {new!r} here"
                for key, (old, new) in changed.items()
            )
            raise VaaniError(
                f"the config does not fit the run in {self.workdir}: {listed}. Use the"
                " run's config, another --workdir, or --config.init_from="
                f"{self.workdir} in a new one to start from its weights"
            )
        if meta.corpus["sha256"] != corpus.sha256:
            raise VaaniError(
                f"the run in {self.workdir} was trained on {meta.corpus['source']}"
                f" ({meta.corpus['characters']:,} characters), this is another text:"
                f" {corpus.source} ({len(corpus.text):,} characters). Give it the same"
                " text, or use another --workdir"
            )

    def _first_state(self, source: LoadedModel | None) -> TrainState:
        """The state before the first step, with the weights of ``source`` if any."""
        state = self.program.first_state()
        if source is None:
            return state
        if source.packed:
            raise VaaniError(
                f"{self.config.init_from} holds a packed model, which has no weights to"
                " train: start from the run that it was packed from"
            )
        ours, theirs = self.config.model, source.config
        shaping = "vocab_size dim n_layers n_heads kv_heads hidden_dim tie_embeddings"
        shaping += " activation"
        changed = [
            f"model.{key} is {getattr(theirs, key)!r} there,"
            f" {getattr(ours, key)!r} here"
            for key in shaping.split()
            if getattr(theirs, key) != getattr(ours, key)
        ]
        if changed:
            raise VaaniError(
                f"the weights in {self.config.init_from} do not fit this config: "
                + "; ".join(changed)
            )
        params = source.params
        if ours.sub_norms != theirs.sub_norms:
            if theirs.sub_norms:
                raise VaaniError(
                    f"the weights in {self.config.init_from} have sub-norms: set"
                    " --config.model.sub_norms=True"
                )
            first = unrolled(ours, state.params, state.quant)[1]
            params = _with_missing(params, jax.tree.map(jnp.copy, first))
            self.say("sub-norms are added, as ones")
        if self.config.model.scan_layers:
            params = stack_layers(params, self.config.model.n_layers)
        params = jax.tree.map(
            lambda leaf, sharding: place(np.asarray(leaf), sharding),
            params,
            self.program.shardings.params,
        )
        state = dataclasses.replace(state, params=params)
        state, _ = self.program.report_step(state)
        if self.tuner is not None:
            codes = jax.tree.map(jnp.copy, state.codes)
            state = dataclasses.replace(state, tuner=state.tuner.replace(codes=codes))
        self.say(
            f"starting from the weights of {self.config.init_from} (step {source.step})"
        )
        return state

    def _announce(self, train_tokens: int, resumed: bool) -> None:
        config, model = self.config, self.config.model
        counts = model_size(model)
        share = counts.ternary / counts.parameters
        kind = "ternary" if model.quantize else "full precision"
        device = self.mesh.devices.flat[0]
        name = device.device_kind if device.platform != "cpu" else "CPU"
        self.say(
            f"model   {kind}, {counts.parameters:,} parameters, {share:.1%} of them in"
            f" ternary kernels; {size(counts.bytes_fp16)} at fp16,"
            f" {size(counts.bytes_2bit)} with 2-bit codes"
        )
        self.say(
            f"        {model.n_layers} layers, dim {model.dim}, {model.n_heads} heads"
            f" ({model.kv_heads} key-value), ffn {model.hidden_dim}"
            f" ({model.activation}), context {model.max_seq_len},"
            f" vocabulary {model.vocab_size}"
        )
        self.say(
            f"data    {self.corpus.source}: {train_tokens:,} tokens to train on,"
            f" {self.validation.tokens:,} to validate"
        )
        self.say(
            f"run     {self.num_steps:,} steps of {config.batch_size} x"
            f" {model.max_seq_len} tokens, {config.optim.name}, on {self.mesh.size}"
            f" x {name}, in {self.workdir}"
        )
        if self.mesh.size > 1 or self.mesh.size < len(jax.devices()):
            cut = " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
            idle = len(jax.devices()) - self.mesh.size
            processes = jax.process_count()
            self.say(
                f"mesh    {cut}, {processes} process{'es' if processes > 1 else ''}"
                + (f"; {idle} devices are not used" if idle else "")
            )
        if resumed:
            self.say(f"resumed at step {self.start:,}")

    # -- The loop -----------------------------------------------------------------

    def run(self) -> Evaluation | None:
        config = self.config
        if self.start >= self.num_steps:
            self.say(
                f"this run is done ({self.start:,} of {self.num_steps:,} steps): raise"
                " --config.num_steps to go on, or choose another --workdir"
            )
            return None
        self._clock = time.perf_counter()
        self._busy_steps = 0
        self._last_eval: tuple[int, Evaluation] | None = None
        step = self.start
        waiting: _Report | None = None
        previous = None
        self._compiled = False
        self._rescued_at = -1
        began = time.perf_counter()
        with (
            Display(self.console, self.num_steps, step) as self.display,
            jax.transfer_guard("disallow"),
        ):
            if step == 0 and self.tuner is not None:
                self._range_test()
            while step < self.num_steps and not self.stop():
                metrics = self._dispatch(step)
                step += 1
                self.window.append(metrics)
                # One step runs while the one before it is looked at.
                if previous is not None:
                    previous["train/loss"].block_until_ready()
                    self._settle(step - 1)
                previous = metrics
                if waiting is not None:
                    self._log(waiting)
                    waiting = None
                if step % config.log_interval == 0 or step == self.num_steps:
                    self.stop.settle()
                    self.state, stats = self.program.report_step(self.state)
                    waiting = _Report(step, self.window, stats)
                    self.window = []
                due = step == self.num_steps
                evaluate = due or step % config.eval_interval == 0
                save = due or step % config.save_interval == 0
                sample = config.sample_interval and step % config.sample_interval == 0
                if evaluate or save or sample:
                    if waiting is not None:
                        self._log(waiting)
                        waiting = None
                    self._settle(step)
                    self._check_finite(
                        step, float(jax.device_get(metrics["train/loss"]))
                    )
                    with self._pause():
                        self._at_boundary(step, evaluate, save, bool(sample or due))
            if self.stop() and step < self.num_steps:
                if waiting is not None:
                    self._log(waiting)
                self._settle(step)
                self._leave(step)
                return None
        return self._finish(step, began)

    def _dispatch(self, step: int, *, adjust: bool = True) -> dict[str, Any]:
        """Starts the next step; returns its metrics, on the device."""
        tokens = self._batch(step)
        began = time.perf_counter()
        self.state, metrics = self.program.train_step(self.state, tokens)
        if not self._compiled:
            self._compiled = True
            metrics["train/loss"].block_until_ready()
            spent = duration(time.perf_counter() - began)
            self.display.say(f"first step done after {spent} of compilation")
            self._clock = time.perf_counter()
            self._busy_steps = -1
        if self.tuner is not None:
            self.pending.append((step + 1, metrics.pop("verdict")))
            if adjust and (step + 1) % self.tuner.config.interval == 0:
                self.state, adjustment = self.program.adjust_step(self.state)
                self.pending.append((step + 1, adjustment))
        return metrics

    def _batch(self, step: int) -> jax.Array:
        """The tokens of a step; each process reads the rows of its own devices."""
        if jax.process_count() == 1:
            return jax.device_put(self.batches.batch_at(step), self.program.batch)
        shape = (self.config.batch_size, self.config.model.max_seq_len + 1)
        return place_parts(
            shape,
            self.program.batch,
            lambda index: self.batches.batch_at(step, index[0]),
        )

    def _number(self, value: float) -> jax.Array:
        """A float32 scalar on every device."""
        return place(np.float32(value), self.program.everywhere)

    # -- The tuner ----------------------------------------------------------------

    def _range_test(self) -> None:
        """Lets the tuner find, or check, the peak of the learning rate."""
        tuner, config, journal = self.tuner, self.config, self.journal
        assert tuner is not None
        assert journal is not None
        given = config.learning_rate
        rates = tuner.probe_rates(self.num_steps)
        if not rates:
            if given == "auto":
                cause = "the usual one: too short a run for a range test"
                journal.range_test(cause, given, tuner.learning_rate)
            return
        kept = jax.tree.map(jnp.copy, self.state)
        losses: list[Any] = []
        for i, rate in enumerate(rates):
            held = self._number(rate)
            self.state = dataclasses.replace(
                self.state, tuner=self.state.tuner.replace(held=held)
            )
            losses.append(self._dispatch(i, adjust=False)["train/loss"])
            if i:
                losses[i - 1] = float(jax.device_get(losses[i - 1]))
                self.display.note(f"range test of the learning rate {i}/{len(rates)}")
                if not losses[i - 1] < 2 * losses[0]:
                    break
            if self.stop():
                break
        losses[-1] = float(jax.device_get(losses[-1]))
        self.display.note("")
        self.pending = []
        self.state = kept
        self._clock = time.perf_counter()
        self._busy_steps = 0
        if self.stop():  # nothing is decided: the next session begins again
            return
        picked = pick_learning_rate(rates, losses, self.num_steps, tuner.config)
        if given == "auto":
            peak, cause = picked, f"from a range test of {len(losses)} steps"
            if peak is None:
                peak = tuner.learning_rate
                cause = "the usual one: the range test shows no slope to read"
        else:
            peak, cause = reconcile(given, picked, tuner.config)
        journal.range_test(cause, given, peak)
        self.state = dataclasses.replace(
            self.state, tuner=self.state.tuner.replace(peak=self._number(peak))
        )

    def _settle(self, step: int) -> None:
        """Takes in what the tuner made of the steps up to ``step``."""
        if self.tuner is None or self.journal is None:
            return
        while self.pending and self.pending[0][0] <= step:
            at, decided = self.pending.pop(0)
            if isinstance(decided, Verdict):
                if jax.device_get(decided.kind) != ACCEPTED:
                    self.journal.verdict(at, jax.device_get(decided), self.layers)
                continue
            adjustment = jax.device_get(decided)
            self.journal.adjustment(at, adjustment, self.tuner.warmup_steps)
            if adjustment.diverged != HEALTHY:
                cause = DIVERGENCES[int(adjustment.diverged)]
                if adjustment.diverged == LOST:
                    cause += (
                        f" (loss {adjustment.loss:.3f}, at its lowest"
                        f" {adjustment.lowest:.3f})"
                    )
                self._rescue(at, cause)

    def _rescue(self, step: int, cause: str) -> None:
        """Goes back to the last good state, with a lower learning rate.

        Only the state goes back: steps and data go on, so that nothing is written twice
        and the batches that did it are not met again.
        """
        assert self.tuner is not None
        assert self.journal is not None
        self.checkpoints.wait()
        rescues = int(jax.device_get(self.state.tuner.rescues_running))
        if rescues >= self.tuner.config.rescues_max:
            cause += f", after going back {rescues} times without a new lowest loss"
            raise self._diverged(step, cause)
        if step >= self.num_steps:
            raise self._diverged(step, f"{cause}, and no steps are left to go back")
        with self._pause(), jax.transfer_guard("allow"):
            tuned = self.tuner.rescued(self.state.tuner)
            now = self.state.step
            state, back_to = self._last_good_state(step)
            self.state = dataclasses.replace(
                state, step=now, tuner=jax.tree.map(jnp.copy, tuned)
            )
        # The steps dispatched since belong to the state that is gone.
        self.pending = []
        factor = float(jax.device_get(self.state.tuner.factor))
        self.journal.rescue(step, back_to, cause, factor)

    def _last_good_state(self, step: int) -> tuple[TrainState, int]:
        """The newest state saved well before ``step``, and how many steps made it."""
        assert self.tuner is not None
        best = self.checkpoints.best_step()
        tuning = self.tuner.config
        # What noticing may have taken.
        margin = max(RECENT, tuning.patience) + tuning.interval
        for candidate in reversed(self.checkpoints.steps()):
            if candidate > step - margin and candidate != best:
                continue
            try:
                restored = self.checkpoints.restore(
                    lambda meta: self.target,
                    step=candidate,
                    notify=self.say,
                )
            except VaaniError:  # damaged, and said so
                continue
            assert restored is not None
            items = restored.items
            return TrainState(**items["model"], **items["training"]), candidate
        source = None
        if self.config.init_from:
            source = load_model(self.config.init_from, notify=self.say)
        return self._first_state(source), 0

    # -- Reports ------------------------------------------------------------------

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """Takes what happens inside off the clock of tokens per second."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def _log(self, report: _Report) -> None:
        fetched, stats = jax.device_get((report.metrics, report.stats))
        now = time.perf_counter()
        steps = len(fetched) + self._busy_steps
        self._busy_steps = 0
        seconds = now - self._clock
        self._clock = now
        self.elapsed += seconds
        last = dict(fetched[-1])
        for key in ("train/loss", "train/gradient_norm"):
            # In float64: a resumed run has read the first of them from its metadata.
            seen = np.asarray([m[key] for m in fetched], np.float64)
            if self.tuner is not None:  # it has skipped those that are not finite
                seen = seen[np.isfinite(seen)]
            if seen.size:
                last[key] = seen.mean()
            else:
                del last[key]
        values: dict[str, Any] = {**last, **stats}
        if steps > 0 and seconds > 0:
            values["perf/tokens_per_second"] = steps * self.tokens_per_step / seconds
            self._seconds_per_step = seconds / steps
        if stats["quant/sparsity"]:
            for name in ("sparsity", "scale", "flipped"):
                layers = [np.mean(v) for v in stats[f"quant/{name}"].values()]
                values[f"quant/mean_{name}"] = np.mean(layers)
        assert self.writer is not None
        row = self.writer.write(report.step, values)
        left = self.num_steps - report.step
        eta = left * getattr(self, "_seconds_per_step", 0.0)
        self.display.update(report.step, row, eta)
        self._check_finite(report.step, row.get("train/loss", math.nan))

    def _check_finite(self, step: int, loss: float) -> None:
        """Ends a diverged run; with a tuner, that is the tuner's to find."""
        if self.tuner is None and not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")

    def _diverged(self, step: int, what: str) -> VaaniError:
        self.checkpoints.wait()
        saved = self.checkpoints.steps()
        kept = f"step {saved[-1]}" if saved else "none was saved yet"
        return VaaniError(
            f"training diverged at step {step}: {what}. Last good checkpoint: {kept}."
            " Try a lower --config.learning_rate (it is"
            f" {self.config.learning_rate}) in a new --workdir"
        )

    def _at_boundary(self, step: int, evaluate: bool, save: bool, sample: bool) -> None:
        last = self.tuner is not None and step == self.num_steps
        # Too few skipped steps to lose patience may still have been all there were.
        if last and not int(jax.device_get(self.state.tuner.count)):
            raise self._diverged(step, DIVERGENCES[STUCK])
        result = None
        if evaluate:
            result = self._evaluate(step)
        if save or (result is not None and self._is_best(step)):
            self._save(step, result)
        if sample and not self.stop():
            self._sample(step)
        assert self.writer is not None
        self.writer.write_history()

    def _evaluate(self, step: int) -> Evaluation | None:
        result = self.validation.evaluate(
            self.program.eval_step,
            self.state.params,
            self.state.quant,
            self.stop,
            functools.partial(place, sharding=self.program.batch),
        )
        if result is None:
            return None
        # Far worse than guessing, or not a number: the weights are at fault, whatever
        # the tuner has seen of it so far.
        if not result.loss < 10 * math.log(self.config.model.vocab_size):
            cause = f"the validation loss is {result.loss:.3g}"
            if self.tuner is None or self._rescued_at == step:
                raise self._diverged(step, cause)
            self._rescued_at = step
            self._rescue(step, cause)
            return self._evaluate(step)
        self._last_eval = (step, result)
        if self.journal is not None:
            tuned, change = self.program.see_evaluation(
                self.state.tuner, self._number(result.loss)
            )
            self.state = dataclasses.replace(self.state, tuner=tuned)
            self.journal.evaluation(step, jax.device_get(change))
        row: Row = {
            "eval/loss": result.loss,
            "eval/perplexity": result.perplexity,
            "eval/bits_per_byte": result.bits_per_byte,
        }
        assert self.writer is not None
        self.writer.write(step, row)
        self.display.update(step, row, self.display.eta)
        better = self.best is None or result.loss < self.best["loss"]
        if better:
            self.best = {"step": step, **result.as_dict()}
        self.display.say(
            f"step {step:>6,}  validation loss {result.loss:.4f}  perplexity"
            f" {result.perplexity:.3f}  bits per byte {result.bits_per_byte:.3f}"
            + ("  (best)" if better else "")
        )
        return result

    def _is_best(self, step: int) -> bool:
        return self.best is not None and self.best["step"] == step

    def _save(self, step: int, result: Evaluation | None) -> None:
        run = self.config.to_dict()
        del run["model"]
        window = tuple(
            {key: float(value) for key, value in metrics.items()}
            for metrics in jax.device_get(self.window)
        )
        metadata = Metadata(
            version=__version__,
            model=self.config.model,
            tokenizer=self.tokenizer.to_json(),
            corpus=as_json(self.corpus),
            run=run,
            elapsed_seconds=self.elapsed,
            best=self.best,
            window=window,
        )
        loss = None if result is None else result.loss
        with self._writing():
            self.checkpoints.save(
                step, _items(self.state), metadata.to_json(), loss=loss
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one line what kept a checkpoint from being written."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types
            if processes.is_peer_error(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise VaaniError(
                f"can't write a checkpoint to {self.checkpoints.directory}:"
                f" {reason[:300]}. The checkpoints before it are whole: make room, and"
                " run the same command again"
            ) from error

    def _sample(self, step: int) -> None:
        sample = self.config.sample
        parts = []
        for prompt in sample.prompts:
            try:
                ids = self.tokenizer.encode(prompt)
            except VaaniError as error:
                self.display.say(f"no sample for the prompt {prompt!r}: {error}")
                continue
            with jax.transfer_guard("allow"):
                config, params, quant = unrolled(
                    self.config.model, self.state.params, self.state.quant
                )
                new = generate(
                    config,
                    params,
                    quant,
                    ids,
                    max_new_tokens=sample.max_new_tokens,
                    sampler=sample.sampler,
                    seed=self.config.seed,
                )
            parts.append(prompt + self.tokenizer.decode(new[0]))
        text = "\n\n--- \n".join(parts)
        if text:
            self.display.say(f"sample at step {step:,}:\n{_indented(text)}")
            path = self.output / "samples" / f"step_{step:06d}.txt"
            write_atomically(path, (text + "\n").encode("utf-8"))
            assert self.writer is not None
            self.writer.write_text(step, "samples", text)

    # -- Endings ------------------------------------------------------------------

    def _leave(self, step: int) -> None:
        """A signal came: save, and say how to go on."""
        self._save(step, None)
        with self._writing():
            self.checkpoints.wait()
        self._write_results(None)
        how = f"go on with:\n  {self.command}" if self.command else "run it again"
        self.say(
            f"stopped at step {step:,} of {self.num_steps:,}; everything is saved in"
            f" {self.workdir}. To {how}"
        )

    def _finish(self, step: int, began: float) -> Evaluation | None:
        with self._writing():
            self.checkpoints.wait()
        final = None
        if self._last_eval is not None and self._last_eval[0] == step:
            final = self._last_eval[1]
        self._write_results(final)
        counts = model_size(self.config.model)
        table = Table(title=f"{self.workdir}", title_justify="left")
        table.add_column("")
        table.add_column("best", justify="right")
        table.add_column("final", justify="right")
        best = self.best or {}
        last = final.as_dict() if final is not None else {}
        for key, label, form in (
            ("loss", "validation loss (nats per token)", "{:.4f}"),
            ("perplexity", "perplexity", "{:.3f}"),
            ("bits_per_byte", "bits per byte", "{:.4f}"),
        ):
            cells = [form.format(d[key]) if d else "-" for d in (best, last)]
            table.add_row(label, *cells)
        table.add_row("step", f"{best.get('step', 0):,}", f"{step:,}")
        rate = step * self.tokens_per_step / max(self.elapsed, 1e-9)
        table.add_section()
        table.add_row("training time", "", duration(self.elapsed))
        table.add_row(
            "this session, everything", "", duration(time.perf_counter() - began)
        )
        table.add_row("training tokens per second", "", f"{rate:,.0f}")
        table.add_row("size at fp16", "", size(counts.bytes_fp16))
        ratio = counts.bytes_fp16 / counts.bytes_2bit
        small = f"{size(counts.bytes_2bit)} ({ratio:.1f} x smaller)"
        if not self.config.model.quantize:
            small = "- (full precision)"
        table.add_row("size with 2-bit codes", "", small)
        self.console.print(table)
        if self.journal is not None:
            self.say(self.journal.summary())
        self.say(f"curves, history and samples are in {self.workdir}")
        return final

    def _write_results(self, final: Evaluation | None) -> None:
        assert self.writer is not None
        self.writer.write_history()
        plot_curves(
            self.writer.rows,
            self.output / "training_curves.png",
            title=f"{self.workdir.name}: "
            + (f"validation loss {self.best['loss']:.4f} at best" if self.best else ""),
            sparsity_band=self.config.sparsity_band,
            events=self.journal.events if self.journal is not None else (),
        )
        summary = {
            "best": self.best,
            "final": None if final is None else final.as_dict(),
            "elapsed_seconds": self.elapsed,
            "corpus": as_json(self.corpus),
            "config": self.config.to_dict(),
        }
        write_atomically(
            self.output / "run.json", (json.dumps(summary, indent=2) + "\n").encode()
        )

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.journal is not None:
            self.journal.close()
        self.checkpoints.close()


def _items(state: TrainState) -> dict[str, Any]:
    """A state in the two parts that a checkpoint holds."""
    training = {
        "step": state.step,
        "opt_state": state.opt_state,
        "codes": state.codes,
        "key": state.key,
    }
    if state.tuner is not None:
        training["tuner"] = state.tuner
    return {
        "model": {"params": state.params, "quant": state.quant},
        "training": training,
    }


def _with_missing(tree: Any, defaults: Any) -> Any:
    """``tree``, with the branches that it lacks from ``defaults``."""
    if not isinstance(defaults, dict):
        return tree
    return {
        key: _with_missing(tree[key], default) if key in tree else default
        for key, default in defaults.items()
    }


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Fills in a vocabulary size of 0; checks any other."""
    wanted = config.model.vocab_size
    if wanted == 0:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(config, model=model)
    if wanted < tokenizer.vocab_size:
        raise VaaniError(
            f"model.vocab_size = {wanted} is smaller than the tokenizer's"
            f" {tokenizer.vocab_size}: leave it at 0 to take the tokenizer's"
        )
    return config


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
