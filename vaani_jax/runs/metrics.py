"""Metrics: what they are called, and their rows on disk.

Rows are JSON lines, and a history by column. Numbers that aren't finite are null there.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from vaani_jax.files import naming, to_json, write_atomically
from vaani_jax.runs.workdir import Workdir

Row = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown, wherever it is.

    Attributes:
      label: what it is, for people.
      unit: what it counts; empty for a pure number.
      panel: of the curves that it belongs to, a key of `vaani_jax.runs.curves.PANELS`
        or a name of its own for a panel of its own; empty for none.
      legend: what it is called there; empty for its label.
      format: of its value.
      console: of its part of the progress line, ``{}`` being the formatted value;
        empty for no part.
    """

    label: str
    unit: str = ""
    panel: str = ""
    legend: str = ""
    format: str = "{:.4g}"
    console: str = ""

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def shown(self, value: float) -> str:
        """A value, formatted."""
        return self.format.format(value)


# In the order of the progress line. What isn't here is written all the same, under its
# key alone. A metric kept per layer has the key that its layers share.
METRICS: dict[str, Metric] = {
    "train/loss": Metric(
        "training loss", "nats per token", "loss", "training", "{:.4f}", "loss {}"
    ),
    "eval/loss": Metric(
        "validation loss", "nats per token", "loss", "validation", "{:.4f}", "val {}"
    ),
    "eval/perplexity": Metric("perplexity", format="{:.3f}"),
    "eval/bits_per_byte": Metric("bits per byte", format="{:.4f}"),
    "train/learning_rate": Metric(
        "learning rate", "", "learning rate", "", "{:.2e}", "lr {}"
    ),
    "train/gradient_norm": Metric(
        "gradient norm", "", "gradient norm", "before clipping", "{:.2f}", "grad {}"
    ),
    "tuner/clip_norm": Metric(
        "norm that gradients are clipped to", "", "gradient norm", "clipped at"
    ),
    "quant/sparsity": Metric("share of zeros", "", "sparsity", format="{:.1%}"),
    "quant/scale": Metric("weight scale", "", "scale"),
    "quant/mean_sparsity": Metric(
        "share of zeros, mean of layers", format="{:.1%}", console="zeros {}"
    ),
    "perf/tokens_per_second": Metric(
        "training speed", "tokens/s", format="{:,.0f}", console="{} tokens/s"
    ),
}


def metric(key: str) -> Metric:
    """The metric of a row's key; one that isn't in `METRICS` is called by its key."""
    for name, known in METRICS.items():
        if key == name or key.startswith(f"{name}/"):  # one layer of it
            return known
    return Metric(key)


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


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Objects of a file with one a line, each of a step.

    What is none is left out: a last line cut short by a kill, or damage.
    """
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def read_rows(path: pathlib.Path) -> list[Row]:
    """Rows of a metrics.jsonl, as `read_records` has them; only what is a number.

    NaN in the place of null, by which a file says that a number is not finite.
    """
    return [
        {
            key: math.nan if value is None else value
            for key, value in record.items()
            if value is None or isinstance(value, int | float)
        }
        for record in read_records(path)
    ]


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
    """``metrics.jsonl`` and ``training_history.json``.

    A row that can't be written is kept, and written with the next history that can.

    Attributes:
      rows: every row so far, those of earlier sessions of the run included.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start_step: int,
    ) -> None:
        paths = Workdir(workdir)
        self._history, self._path = paths.history, paths.metrics
        # A resumed run repeats the steps after its checkpoint: their rows go.
        self.rows = [row for row in read_rows(self._path) if row["step"] <= start_step]
        self._rewrite()
        self._whole = True

    def _rewrite(self) -> None:
        lines = "".join(to_json(row) + "\n" for row in self.rows)
        write_atomically(self._path, lines.encode())

    def add(self, step: int, metrics: Mapping[str, Any]) -> Row:
        """Keeps scalars, and returns them flattened; `write` puts them on disk."""
        values = flatten(metrics)
        self.rows.append({"step": step, **values})
        return values

    def write(self) -> None:
        """Writes the last row; raises OSError."""
        line = to_json(self.rows[-1]) + "\n"
        try:
            with naming(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            self._whole = False  # perhaps half a line
            raise

    def write_history(self) -> None:
        """Writes all rows by column, and again what could not be; raises OSError."""
        if not self._whole:
            self._rewrite()
            self._whole = True
        content = to_json(history(self.rows)) + "\n"
        write_atomically(self._history, content.encode())
