"""Training curves as a picture."""

import io
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vaani_jax.files import write_atomically
from vaani_jax.runs.metrics import Row, history

Columns = dict[str, dict[str, list[float]]]


TRAIN, VALIDATION, BAND = "#4878a8", "#c8553d", "#7fb069"


def _layers(columns: Columns, name: str) -> tuple[list[float], np.ndarray] | None:
    """Steps, and the values [layers, steps] of a metric kept per layer."""
    found = [v for k, v in columns.items() if k.startswith(f"{name}/")]
    if not found:
        return None
    return found[0]["step"], np.asarray([c["value"] for c in found])


def _marks(events: Iterable[Mapping[str, Any]], axes: Any) -> dict[str, Any]:
    """Steps, axes and style of the tuner's events, by label."""
    loss, _, rate, gradient, sparsity, _ = axes
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
    """Draws loss, perplexity, learning rate, gradient norm, sparsity and scale.

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
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    axes: Any = figure.subplots(2, 3)

    def line(axis: Any, key: str, label: str, color: str, **style: Any) -> None:
        if key in columns:
            c = columns[key]
            axis.plot(c["step"], c["value"], label=label, color=color, **style)

    loss, perplexity, rate, gradient, sparsity, scale = axes.flat
    line(loss, "train/loss", "training", TRAIN, lw=1)
    line(loss, "eval/loss", "validation", VALIDATION, marker="o", ms=3)
    loss.set_ylabel("loss (nats per token)")
    for key, label, color, style in (
        ("train/loss", "training", TRAIN, {"lw": 1}),
        ("eval/loss", "validation", VALIDATION, {"marker": "o", "ms": 3}),
    ):
        if key in columns:
            c = columns[key]
            values = np.exp(np.minimum(c["value"], 50.0))
            perplexity.plot(c["step"], values, label=label, color=color, **style)
            perplexity.set_yscale("log")
    perplexity.set_ylabel("perplexity")
    line(rate, "train/learning_rate", "learning rate", TRAIN)
    rate.set_ylabel("learning rate (applied)")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    line(gradient, "train/gradient_norm", "before clipping", TRAIN, lw=1)
    line(gradient, "tuner/clip_norm", "clipped at", BAND, lw=1, ls="--")
    if "train/gradient_norm" in columns:
        gradient.set_yscale("log")
    gradient.set_ylabel("gradient norm (unclipped)")
    for axis, name, label in (
        (sparsity, "quant/sparsity", "share of zeros"),
        (scale, "quant/scale", "weight scale"),
    ):
        layers = _layers(columns, name)
        axis.set_ylabel(label)
        if layers is None:
            axis.text(0.5, 0.5, "full precision", ha="center", transform=axis.transAxes)
            continue
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
    if sparsity_band is not None:
        sparsity.axhspan(*sparsity_band, color=BAND, alpha=0.3, label="target band")
    for label, (steps, targets, style) in _marks(events, axes.flat).items():
        for axis in targets:
            # Along the lower edge, in data units across and in the axes' own upward.
            place = axis.get_xaxis_transform()
            height = [0.03] * len(steps)
            axis.plot(steps, height, ls="", transform=place, label=label, **style)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
