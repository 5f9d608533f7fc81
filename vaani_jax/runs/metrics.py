"""Rows of metrics on disk: JSON lines, TensorBoard event files, a history."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from vaani_jax.files import write_atomically
from vaani_jax.runs.workdir import Workdir

Row = dict[str, float]


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
        paths = Workdir(workdir)
        self._history = paths.history
        path = paths.metrics
        # A resumed run repeats the steps after its checkpoint: their rows go.
        self.rows = [row for row in read_rows(path) if row["step"] <= start_step]
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(path, lines.encode())
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(paths.tensorboard), purge_step=start_step + 1)

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
