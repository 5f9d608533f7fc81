"""Training curves as a picture."""

import dataclasses
import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vaani_jax.files import write_atomically
from vaani_jax.runs.metrics import METRICS, Row, history

Columns = dict[str, dict[str, list[float]]]


TRAIN, VALIDATION, BAND = "#4878a8", "#c8553d", "#7fb069"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes that metrics share.

    Attributes:
      label: of the vertical axis.
      line: style of the curves, as matplotlib has it.
      log: whether the vertical axis is logarithmic.
      powers: whether its numbers are written as powers of ten.
      exponential_of: the panel whose metrics are drawn here, too, as their
        exponential; empty for a panel of its own metrics.
      layers: whether its metric is kept per layer.
    """

    label: str
    line: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log: bool = False
    powers: bool = False
    exponential_of: str = ""
    layers: bool = False


THIN = {"lw": 1}


# Row by row, `COLUMNS` in each. Metrics say in `vaani_jax.runs.metrics.METRICS` where
# they belong.
PANELS: dict[str, Panel] = {
    "loss": Panel("loss (nats per token)", THIN),
    "perplexity": Panel("perplexity", THIN, log=True, exponential_of="loss"),
    "learning rate": Panel("learning rate (applied)", powers=True),
    "gradient norm": Panel("gradient norm (unclipped)", THIN, log=True),
    "sparsity": Panel("share of zeros", layers=True),
    "scale": Panel("weight scale", layers=True),
}


COLUMNS = 3


# By the first part of a metric's key: who it comes from.
STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": TRAIN},
    "eval": {"color": VALIDATION, "marker": "o", "ms": 3, "lw": None},
    "tuner": {"color": BAND, "ls": "--"},
}


def _layers(columns: Columns, name: str) -> tuple[list[float], np.ndarray] | None:
    """Steps, and the values [layers, steps] of a metric kept per layer."""
    found = [v for k, v in columns.items() if k.startswith(f"{name}/")]
    if not found:
        return None
    return found[0]["step"], np.asarray([c["value"] for c in found])


def _panels(columns: Columns) -> dict[str, Panel]:
    """The panels of `PANELS`, and those that further metrics at hand ask for."""
    panels = dict(PANELS)
    for key, metric in METRICS.items():
        if metric.panel and metric.panel not in panels and key in columns:
            panels[metric.panel] = Panel(metric.title)
    return panels


def _draw(axis: Any, name: str, panel: Panel, columns: Columns) -> None:
    """One panel: the curves of its metrics, or the spread of its layers."""
    axis.set_ylabel(panel.label)
    if panel.powers:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for key, metric in METRICS.items():
        if metric.panel != (panel.exponential_of or name):
            continue
        if panel.layers:
            _draw_layers(axis, _layers(columns, key))
        elif key in columns:
            column = columns[key]
            values: Any = column["value"]
            if panel.exponential_of:
                values = np.exp(np.minimum(values, 50.0))
            style = {**panel.line, **STYLES.get(key.partition("/")[0], {})}
            label = metric.legend or metric.label
            axis.plot(column["step"], values, label=label, **style)
            if panel.log and np.any(np.asarray(values) > 0):
                axis.set_yscale("log")


def _draw_layers(axis: Any, layers: tuple[list[float], np.ndarray] | None) -> None:
    if layers is None:
        axis.text(0.5, 0.5, "full precision", ha="center", transform=axis.transAxes)
        return
    steps, values = layers
    axis.fill_between(
        steps,
        values.min(axis=0),
        values.max(axis=0),
        color=TRAIN,
        alpha=0.25,
        lw=0,
        label="lowest to highest layer",
    )
    axis.plot(steps, values.mean(axis=0), color=TRAIN, label="mean of layers")


def _marks(
    events: Iterable[Mapping[str, Any]], axes: Mapping[str, Any]
) -> dict[str, Any]:
    """Steps, axes and style of the tuner's events, by label.

    Args:
      events: of the tuner's journal.
      axes: by the name of the panel.
    """
    loss, rate = axes["loss"], axes["learning rate"]
    gradient, sparsity = axes["gradient norm"], axes["sparsity"]
    marks: dict[str, Any] = {}

    def mark(label: str, step: float, targets: list[Any], **style: Any) -> None:
        marks.setdefault(label, ([], targets, {"ms": 6, **style}))[0].append(step)

    for event in events:
        step, setting = event["step"], event["setting"]
        if setting == "state":
            mark("went back", step, [loss, rate], marker="X", color=VALIDATION)
        elif setting == "step":
            style = {"marker": "x", "color": VALIDATION}
            mark(f"{event['done']} step", step, [loss, gradient], **style)
        elif setting == "learning_rate_factor":
            down = event["new"] < event["old"]
            label, marker = ("cut", "v") if down else ("raised", "^")
            color = VALIDATION if down else BAND
            mark(f"factor {label}", step, [rate], marker=marker, color=color)
        elif setting == "threshold":
            mark("threshold moved", step, [sparsity], marker="|", color="#666666")
    return marks


def plot_curves(
    rows: list[Row],
    path: pathlib.Path,
    *,
    title: str = "",
    sparsity_band: tuple[float, float] | None = None,
    events: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Draws `PANELS`: loss, perplexity, learning rate, gradient norm, sparsity, scale.

    Args:
      rows: of `MetricWriter`.
      path: the PNG to write, whole or not at all.
      title: above everything.
      sparsity_band: lowest and highest share of zeros aimed at, drawn as a band.
      events: of the tuner's journal; those that matter are marked.
    """
    # Not pyplot: no global state, and no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = history(rows)
    panels = _panels(columns)
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(13, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    grid: Any = figure.subplots(lines, COLUMNS)
    axes = dict(zip(panels, grid.flat, strict=False))
    for spare in list(grid.flat)[len(panels) :]:
        spare.remove()
    for name, panel in panels.items():
        _draw(axes[name], name, panel, columns)
    if sparsity_band is not None:
        axes["sparsity"].axhspan(
            *sparsity_band, color=BAND, alpha=0.3, label="target band"
        )
    for label, (steps, targets, style) in _marks(events, axes).items():
        for axis in targets:
            # Along the lower edge, in data units across and in the axes' own upward.
            place = axis.get_xaxis_transform()
            height = [0.03] * len(steps)
            axis.plot(steps, height, ls="", transform=place, label=label, **style)
    for axis in axes.values():
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
