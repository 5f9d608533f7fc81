"""What a run tells: rows on disk, event files, lines or a live display for people."""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Table
from tensorboardX import SummaryWriter

from vaani_jax.files import write_atomically

Row = dict[str, float]
LINE_SECONDS = 5.0  # between plain lines, where there is no terminal


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Row:
    """Nested metrics to one level: ``quant/sparsity`` with layers below it.

    Arrays with one entry per layer get their index: ``.../attn/q_proj[3]``.
    """
    row: Row = {}
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            row |= flatten(value, f"{name}/")
        elif np.ndim(value) == 0:
            row[name] = float(value)
        else:
            row |= {f"{name}[{i}]": float(v) for i, v in enumerate(np.ravel(value))}
    return row


def read_rows(path: pathlib.Path) -> list[Row]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def history(rows: list[Row]) -> dict[str, dict[str, list[float]]]:
    """Rows to columns: ``{"train/loss": {"step": [...], "value": [...]}, ...}``."""
    columns: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step":
                column = columns.setdefault(key, {"step": [], "value": []})
                column["step"].append(row["step"])
                column["value"].append(value)
    return columns


class MetricWriter:
    """``metrics.jsonl``, TensorBoard events and ``training_history.json``.

    Attributes:
      rows: every row so far, those of earlier sessions of the run included.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int) -> None:
        self._history = workdir / "training_history.json"
        path = workdir / "metrics.jsonl"
        # A resumed run repeats the steps after its checkpoint: their rows go.
        self.rows = [row for row in read_rows(path) if row["step"] <= start_step]
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(path, lines.encode())
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> Row:
        """Writes scalars; returns them flattened."""
        values = flatten(metrics)
        row = {"step": step, **values}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._events.add_scalar(key, value, step)
        return values

    def write_text(self, step: int, tag: str, text: str) -> None:
        self._events.add_text(tag, text, step)

    def write_history(self) -> None:
        content = json.dumps(history(self.rows)) + "\n"
        write_atomically(self._history, content.encode())

    def close(self) -> None:
        self._file.close()
        self._events.close()


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 05 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


class Display:
    """Progress: a live bar on a terminal, plain lines elsewhere.

    Use as a context manager around the loop.
    """

    def __init__(self, console: Console, num_steps: int, start_step: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._start = start_step
        self._last_line = time.monotonic()
        self._values: Row = {}
        self._note = ""
        self.eta = 0.0
        self._live: Live | None = None
        # A dumb terminal can't move its cursor: it gets the plain lines.
        if console.is_terminal and not console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                console=console,
            )
            self._task = self._progress.add_task(
                "train", total=num_steps, completed=start_step
            )
            self._live = Live(
                self._render(), console=console, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> "Display":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live:
            self._live.__exit__(*details)

    def update(self, step: int, values: Row, eta_seconds: float) -> None:
        """Shows the state of a run after ``step`` steps."""
        self._values |= values
        self.eta = eta_seconds
        if self._live:
            self._progress.update(self._task, completed=step)
            self._live.update(self._render())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(
                f"step {step:>6,}/{self._num_steps:,}  {self._summary()}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, message: Any) -> None:
        """Prints a line, or anything that rich prints, above the bar."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def note(self, message: str) -> None:
        """What is going on besides training; empty for nothing."""
        self._note = message
        if self._live:
            self._live.update(self._render())
        elif message and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(message)

    def _summary(self) -> str:
        v = self._values
        parts = [self._note] if self._note else []
        if "train/loss" in v:
            parts.append(f"loss {v['train/loss']:.4f}")
        if "eval/loss" in v:
            parts.append(f"val {v['eval/loss']:.4f}")
        if "train/learning_rate" in v:
            parts.append(f"lr {v['train/learning_rate']:.2e}")
        if "train/gradient_norm" in v:
            parts.append(f"grad {v['train/gradient_norm']:.2f}")
        if "quant/mean_sparsity" in v:
            parts.append(f"zeros {v['quant/mean_sparsity']:.1%}")
        if "perf/tokens_per_second" in v:
            parts.append(f"{v['perf/tokens_per_second']:,.0f} tokens/s")
        if self.eta:
            parts.append(f"ETA {duration(self.eta)}")
        return "  ".join(parts)

    def _render(self) -> Table:
        grid = Table.grid()
        grid.add_row(self._progress)
        grid.add_row(self._summary())
        return grid
