"""Trains a model, or goes on training it."""

import argparse
import pathlib
import shlex
import sys

from vaani_jax.errors import VaaniError

FLAGS = ""  # whatever it is: those of the config, of workdir and processes
HELP = "Train a ternary language model."

DESCRIPTION = """Trains a ternary language model.

    vaani train --config=configs/small.py
    vaani train --config=configs/small.py --workdir=runs/mine --config.seed=1

The same command again resumes the run in its workdir (runs/<name of the config> by
default). Ctrl-C stops it without loss. `vaani config` lists the keys; any of them can
be set with --config.KEY=VALUE.

All devices are used, see the keys of mesh. Processes of one job, on one machine or
many, find each other under Slurm, Open MPI and on TPU slices; --distributed asks JAX
to look further (Kubernetes), and without any scheduler each is told:

    vaani train --config=configs/small.py --coordinator=HOST:PORT \\
        --num_processes=2 --process_id=0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION


def run(options: argparse.Namespace) -> int:
    # These imports take seconds: here, Ctrl-C already ends in one line.
    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.devices.processes import join
    from vaani_jax.train.loop import train

    if not options.flags:
        print(DESCRIPTION.strip())
        return 2
    given = config_from_flags(options.flags)
    join(
        given.coordinator,
        given.num_processes,
        given.process_id,
        expected=given.distributed,
    )
    file = pathlib.Path(given.path)
    if not given.workdir and not file.is_file():
        raise VaaniError(f"{file} is a pipe, which names no run: say --workdir=DIR too")
    workdir = given.workdir or str(pathlib.Path("runs") / file.stem)
    train(given.config, workdir, command=_command(options.flags))
    return 0


def _command(flags: list[str]) -> str:
    """What was typed, for the line that says how to go on."""
    name = pathlib.Path(sys.argv[0]).name
    program = {
        "train.py": ["python", "train.py"],
        "__main__.py": ["python", "-m", "vaani_jax", "train"],
    }
    return shlex.join([*program.get(name, ["vaani", "train"]), *flags])
