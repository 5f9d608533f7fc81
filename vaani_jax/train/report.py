"""What a run tells: what it is, how it comes along, and what came of it."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.table import Table

from vaani_jax.data.sources import as_json
from vaani_jax.errors import VaaniError
from vaani_jax.evaluate.loss import Evaluation
from vaani_jax.files import to_json, write_atomically
from vaani_jax.inference.generate import generate, until_end
from vaani_jax.inference.model import Model
from vaani_jax.model.size import model_size
from vaani_jax.model.transformer import unrolled
from vaani_jax.runs.curves import plot_curves
from vaani_jax.runs.metrics import METRICS, MetricWriter, Row
from vaani_jax.runs.tensorboard import EventWriter
from vaani_jax.runs.workdir import Workdir
from vaani_jax.text.prompts import USUAL, default_prompt
from vaani_jax.text.tokenizers import continuation
from vaani_jax.train.clock import Clock
from vaani_jax.train.display import Display
from vaani_jax.train.extras import Extras
from vaani_jax.train.guard import Guard
from vaani_jax.train.start import Start
from vaani_jax.train.state import TrainState
from vaani_jax.words import duration, plural, size

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Due:
    """Metrics on the device, to be fetched while a later step runs."""

    step: int
    metrics: list[Metrics]
    stats: Metrics


class Report:
    """Metrics, samples and results of a run, on disk and in words.

    Attributes:
      window: metrics of the steps since the last row, on the device or fetched.
      best: the best evaluation, with its step; None before any.
    """

    def __init__(
        self,
        start: Start,
        output: pathlib.Path,
        display: Display,
        clock: Clock,
        guard: Guard,
    ) -> None:
        """Opens the files.

        Args:
          start: of the run.
          output: the folder to write to.
          display: shows it to people.
          clock: of training.
          guard: knows which values count, and what it decided.
        """
        self.window: list[Metrics] = list(start.progress.window)
        self.best = start.progress.best
        self._start = start
        self._paths = Workdir(output)
        self._display = display
        self._clock = clock
        self._guard = guard
        self._due: _Due | None = None
        self._extras = Extras(display.say)
        self._writer = MetricWriter(output, start.progress.step)
        self._events = EventWriter(self._paths.tensorboard, start.progress.step)

    def announce(self) -> None:
        """Says what is about to be trained, on what."""
        for line in announcement(self._start):
            self._display.say(line)

    # -- Rows --------------------------------------------------------------------------

    def due(self, step: int, stats: Metrics) -> None:
        """A row is due: of the window, and of ``stats``, both still on the device."""
        self._due = _Due(step, self.window, stats)
        self.window = []

    def flush(self) -> None:
        """Fetches and writes the row that is due, if one is."""
        if self._due is None:
            return
        due, self._due = self._due, None
        fetched, stats = jax.device_get((due.metrics, due.stats))
        rate = self._clock.lap(len(fetched))
        values: Metrics = {**self._means(fetched), **stats}
        if rate:
            values["perf/tokens_per_second"] = rate * self._tokens_per_step
        if stats["quant/sparsity"]:
            for name in ("sparsity", "scale", "flipped"):
                layers = [np.mean(v) for v in stats[f"quant/{name}"].values()]
                values[f"quant/mean_{name}"] = np.mean(layers)
        row = self._write(due.step, values)
        left = self._start.num_steps - due.step
        self._display.update(due.step, row, left * self._clock.seconds_per_step)
        self._guard.check_loss(due.step, row.get("train/loss", float("nan")))

    def _write(self, step: int, values: Metrics) -> Row:
        """Writes a row wherever rows go; returns it flattened."""
        row = self._writer.add(step, values)
        with self._extras.trying(
            f"row in {self._paths.metrics.name}", way_on="it is kept for later"
        ):
            self._writer.write()
        with self._extras.trying("events for TensorBoard"):
            self._events.scalars(step, row)
        return row

    def _means(self, fetched: list[Metrics]) -> Metrics:
        """The last of the metrics, with means where they say more."""
        last = dict(fetched[-1])
        for key in ("train/loss", "train/gradient_norm"):
            # In float64: a resumed run has read the first of them from its metadata.
            values = self._guard.counted(
                np.asarray([metrics[key] for metrics in fetched], np.float64)
            )
            if values.size:
                last[key] = values.mean()
            else:
                del last[key]
        return last

    @property
    def _tokens_per_step(self) -> int:
        config = self._start.config
        return config.batch_size * config.model.max_seq_len

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Writes an evaluation, and whether it is the best so far."""
        row: Row = {
            "eval/loss": result.loss,
            "eval/perplexity": result.perplexity,
            "eval/bits_per_byte": result.bits_per_byte,
        }
        self._write(step, row)
        self._display.update(step, row, self._display.eta)
        # Compared over the same windows: the last evaluation takes more of them.
        best = self.best
        better = best is None or result.comparable < best.get(
            "sampled_loss", best["loss"]
        )
        if better:
            self.best = {"step": step, **result.as_dict()}
        self._display.say(
            f"step {step:>6,}  validation loss {result.loss:.4f}  perplexity"
            f" {result.perplexity:.3f}  bits per byte {result.bits_per_byte:.3f}"
            + ("  (best)" if better else "")
        )

    def is_best(self, step: int) -> bool:
        """Whether the best evaluation is that of this step."""
        return self.best is not None and self.best["step"] == step

    def sample(self, step: int, state: TrainState) -> None:
        """Lets the model write, and shows it."""
        parts = []
        for prompt in _prompts(self._start):
            with self._extras.trying(f"sample for the prompt {prompt!r}"):
                parts.append(self._continued(prompt, state))
        if not parts:
            return
        text = "\n\n--- \n".join(parts)
        self._display.say(f"sample at step {step:,}:\n{_indented(text)}")
        with self._extras.trying("file of samples"):
            content = (text + "\n").encode("utf-8", errors="replace")
            write_atomically(self._paths.sample(step), content)
        with self._extras.trying("events for TensorBoard"):
            self._events.text(step, "samples", text)

    def _continued(self, prompt: str, state: TrainState) -> str:
        config, tokenizer = self._start.config, self._start.data.tokenizer
        ids = tokenizer.encode_prompt(prompt)
        with jax.transfer_guard("allow"):
            module, variables = unrolled(config.vaani, state.variables)
            new = generate(
                Model(module, variables, tokenizer),
                ids,
                max_new_tokens=config.sample.max_new_tokens,
                sampler=config.sample.sampler,
                seed=config.seed,
            )
        return prompt + continuation(tokenizer, ids, until_end(new[0], tokenizer))

    # -- Endings -----------------------------------------------------------------------

    def write_history(self) -> None:
        """Writes every row so far by column."""
        with self._extras.trying(f"{self._paths.history.name}"):
            self._writer.write_history()

    def stopped(self, step: int, command: str) -> None:
        """Says how to go on from a checkpoint of this step."""
        self._write_results(None)
        how = f"go on with:\n  {command}" if command else "run it again"
        self._display.say(
            f"stopped at step {step:,} of {self._start.num_steps:,}; everything is"
            f" saved in {self._start.workdir}. To {how}"
        )

    def finished(self, final: Evaluation | None) -> None:
        """Shows and writes what came of a run that is over."""
        self._write_results(None if final is None else final.as_dict())
        self._display.print(self._table(final))
        if summary := self._guard.summary():
            self._display.say(summary)
        self._display.say(f"curves, history and samples are in {self._start.workdir}")

    def completed(self) -> None:
        """Writes what a run that is over lacks, and says so."""
        paths, final = self._paths, self._final()
        lacks = [
            path
            for path in (paths.history, paths.curves, paths.summary)
            if not path.exists()
        ]
        if final is not None and not lacks and not _has_final(paths.summary):
            lacks = [paths.summary]
        if not lacks:
            return
        self._write_results(final)
        self._display.say(f"written now: {', '.join(path.name for path in lacks)}")

    def _final(self) -> dict[str, float] | None:
        """The scores of the evaluation at the end, as far as they are known."""
        end = self._start.num_steps
        if self.best is not None and self.best["step"] == end:
            return {key: self.best[key] for key in self.best if key != "step"}
        for row in reversed(self._writer.rows):
            if row["step"] == end and "eval/loss" in row:
                return {
                    **_unprefixed(row),
                    "tokens": self._start.data.validation.tokens,
                }
        return None

    def _table(self, final: Evaluation | None) -> Table:
        start = self._start
        table = Table(title=f"{start.workdir}", title_justify="left")
        table.add_column("")
        table.add_column("best", justify="right")
        table.add_column("final", justify="right")
        best = self.best or {}
        last = final.as_dict() if final is not None else {}
        for key in ("loss", "perplexity", "bits_per_byte"):
            known = METRICS[f"eval/{key}"]
            cells = [known.shown(d[key]) if d else "-" for d in (best, last)]
            table.add_row(known.title, *cells)
        table.add_row("step", f"{best.get('step', 0):,}", f"{start.num_steps:,}")
        elapsed = self._clock.elapsed
        rate = start.num_steps * self._tokens_per_step / max(elapsed, 1e-9)
        table.add_section()
        table.add_row("training time", "", duration(elapsed))
        table.add_row("this session, everything", "", duration(self._clock.session()))
        table.add_row("training tokens per second", "", f"{rate:,.0f}")
        counts = model_size(start.config.vaani)
        table.add_row("size at fp16", "", size(counts.bytes_fp16))
        ratio = counts.bytes_fp16 / counts.bytes_2bit
        small = f"{size(counts.bytes_2bit)} ({ratio:.1f} x smaller)"
        if not start.config.quantization.quantize:
            small = "- (full precision)"
        table.add_row("size with 2-bit codes", "", small)
        return table

    def _write_results(self, final: Mapping[str, Any] | None) -> None:
        config, best = self._start.config, self.best
        self.write_history()
        with self._extras.trying("picture of the curves"):
            plot_curves(
                self._writer.rows,
                self._paths.curves,
                title=f"{self._start.workdir.name}: "
                + (f"validation loss {best['loss']:.4f} at best" if best else ""),
                sparsity_band=config.sparsity_band,
                events=self._guard.events,
            )
        summary = {
            "best": best,
            "final": final,
            "elapsed_seconds": self._clock.elapsed,
            "corpus": as_json(self._start.data.corpus),
            "config": config.to_dict(),
        }
        content = to_json(summary, indent=2) + "\n"
        try:
            write_atomically(self._paths.summary, content.encode())
        except OSError as error:
            raise VaaniError(
                f"can't write {self._paths.summary}: {error.strerror}. The checkpoints"
                " are whole: make room, and the same command writes it"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._events.close()


def _has_final(summary: pathlib.Path) -> bool:
    """Whether a run.json holds the results of a run that is over."""
    try:
        return json.loads(summary.read_text(encoding="utf-8"))["final"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unprefixed(row: Row) -> dict[str, float]:
    """The scores of an evaluation, as `Evaluation.as_dict` calls them."""
    prefix = "eval/"
    return {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}


def announcement(start: Start) -> list[str]:
    """Lines that say what a run is, and where it stands."""
    config, model, mesh = start.config, start.config.model, start.mesh
    counts = model_size(config.vaani)
    share = counts.ternary / counts.parameters
    kind = "ternary" if config.quantization.quantize else "full precision"
    device = mesh.devices.flat[0]
    name = device.device_kind if device.platform != "cpu" else "CPU"
    held_out = start.data.validation
    within = ""
    if held_out.sampled_tokens < held_out.tokens:
        within = f", {held_out.sampled_tokens:,} of them before the run's end"
    lines = [
        f"model   {kind}, {counts.parameters:,} parameters, {share:.1%} of them in"
        f" ternary kernels; {size(counts.bytes_fp16)} at fp16,"
        f" {size(counts.bytes_2bit)} with 2-bit codes",
        f"        {model.n_layers} layers, dim {model.dim}, {model.n_heads} heads"
        f" of {model.head_size} ({model.kv_heads} key-value), ffn {model.hidden_dim}"
        f" ({model.activation}), context {model.max_seq_len},"
        f" vocabulary {model.vocab_size}",
        f"data    {start.data.corpus.source}: {start.data.train_tokens:,} tokens to"
        f" train on, {held_out.tokens:,} to validate{within}",
        f"run     {start.num_steps:,} steps of {config.batch_size} x"
        f" {model.max_seq_len} tokens, {config.optim.name}, on {mesh.size}"
        f" x {name}, in {start.workdir}",
    ]
    if not config.sample.prompts and (prompt := _prompts(start)[0]) != USUAL:
        lines.append(
            "sample  a line break, the usual prompt, has no ids with this tokenizer:"
            f" they continue {prompt!r}, as the text begins"
        )
    lines += [f"note    {note}" for note in start.data.notes]
    idle = len(jax.devices()) - mesh.size
    if mesh.size > 1 or idle:
        cut = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
        line = f"mesh    {cut}, {plural(jax.process_count(), 'process', 'processes')}"
        if idle:
            line += f"; {plural(idle, 'device is', 'devices are')} not used"
        lines.append(line)
    progress = start.progress
    if progress.resumed:
        lines.append(f"resumed at step {progress.step:,}")
        if progress.step < start.num_steps:
            lines += progress.consequences
    return lines


def _prompts(start: Start) -> tuple[str, ...]:
    """What samples continue."""
    data = start.data
    usual = default_prompt(data.tokenizer, data.corpus.opening)
    return start.config.sample.prompts or (usual,)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
