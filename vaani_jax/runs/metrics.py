"""Metrics: what they are called, and their rows on disk.

Rows are JSON lines, TensorBoard event files and a history.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from vaani_jax.files import write_atomically
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


def read_rows(path: pathlib.Path) -> list[Row]:
    """Rows of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
            self._events.add_scalar(
                key, value, step, summary_description=metric(key).title
            )
        return values

    def write_text(self, step: int, tag: str, text: str) -> None:
        self._events.add_text(tag, text, step)

    def write_history(self) -> None:
        content = json.dumps(history(self.rows)) + "\n"
        write_atomically(self._history, content.encode())

    def close(self) -> None:
        self._file.close()
        self._events.close()
