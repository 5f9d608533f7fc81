"""Draws the training curves of a run."""

import argparse
import json
import pathlib

from vaani_jax.errors import VaaniError
from vaani_jax.paths import local, new_file

HELP = "Draw the training curves of a run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    parser.add_argument("--output", default="", help="PNG; in the workdir if not given")


def run(options: argparse.Namespace) -> int:
    from vaani_jax.runs.curves import plot_curves
    from vaani_jax.runs.metrics import read_rows
    from vaani_jax.runs.workdir import Workdir
    from vaani_jax.train.journal import read_events

    workdir = local(options.workdir, "--workdir")
    paths = Workdir(workdir)
    rows = read_rows(paths.metrics)
    if not rows:
        raise VaaniError(f"{workdir} holds no {paths.metrics.name} with rows to plot")
    output = new_file(options.output or paths.curves, "--output")
    plot_curves(
        rows,
        output,
        title=workdir.resolve().name,
        sparsity_band=_sparsity_band(paths.summary),
        events=read_events(paths.events),
    )
    print(output)
    return 0


def _sparsity_band(summary: pathlib.Path) -> tuple[float, float] | None:
    """The band that a run aimed at, where it has written its results."""
    try:
        config = json.loads(summary.read_text(encoding="utf-8"))["config"]
        low, high = config["target_sparsity_min"], config["target_sparsity_max"]
    except (OSError, ValueError, KeyError):
        return None
    return None if low is None else (low, high)
