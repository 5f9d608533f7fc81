"""The command line: ``vaani COMMAND``, or ``python -m vaani_jax COMMAND``.

Results go to standard output, everything else to standard error.
"""

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.words import NO_ROOM

# A further command is a module and a row. A module has HELP (a sentence),
# ``add_arguments(parser)`` and ``run(options) -> status``. Where it has FLAGS, a word,
# arguments that begin with it and are unknown to its parser come as ``options.flags``.
# Modules import what is heavy within functions: the command line starts without JAX.
COMMANDS = {
    "train": "vaani_jax.cli.train",
    "generate": "vaani_jax.cli.generate",
    "evaluate": "vaani_jax.cli.evaluate",
    "pack": "vaani_jax.cli.pack",
    "export": "vaani_jax.cli.export",
    "import": "vaani_jax.cli.import_",
    "plan": "vaani_jax.cli.plan",
    "plot": "vaani_jax.cli.plot",
    "config": "vaani_jax.cli.config",
}


ROOM = ": make room there, or choose another place, and run the same command again"


def run_guarded(main: Callable[[Any], int], argument: Any) -> int:
    """Runs a command; what a user can mend becomes one line and status 1."""
    # Orbax logs verbosely through absl, with traces of all its threads where a disk is
    # full; people get our lines.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal has no character for is replaced there, and nowhere else.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        return main(argument)
    except VaaniError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = ROOM if error.errno in NO_ROOM else ""
        print(f"error: {error.strerror or error}{where}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser(wanted: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands in `COMMANDS`.

    Args:
      wanted: those whose flags are read, which may mean to import much; all for None.
    """
    parser = argparse.ArgumentParser(
        prog="vaani", description="Ternary language models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if wanted is None or name in wanted:
            module.add_arguments(sub)
        sub.set_defaults(module=module)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = make_parser([name for name in COMMANDS if name in given])
    options, flags = parser.parse_known_args(arguments)
    taken = getattr(options.module, "FLAGS", None)
    unknown = flags
    if taken is not None:  # with values that stand apart: --config small
        unknown = [flag for flag in flags if flag.startswith("-")]
        unknown = [flag for flag in unknown if not flag.lstrip("-").startswith(taken)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.flags = flags
    status = run_guarded(options.module.run, options)
    processes = sys.modules.get("vaani_jax.devices.processes")
    if status and processes is not None:
        processes.leave(status)  # the others would wait for us
    return status
