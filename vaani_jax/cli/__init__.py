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
from typing import Any, NoReturn

from vaani_jax.errors import VaaniError
from vaani_jax.words import NO_ROOM, first_line, one_line, shown

# A further command is a module and a row. A module has HELP (a sentence),
# ``add_arguments(parser)`` and ``run(options) -> status``. Where it has FLAGS, a word,
# arguments that begin with it and are unknown to its parser come as ``options.flags``.
# Modules import what is heavy within functions: the command line starts without JAX.
COMMANDS = {
    "train": "vaani_jax.cli.train",
    "generate": "vaani_jax.cli.generate",
    "chat": "vaani_jax.cli.chat",
    "evaluate": "vaani_jax.cli.evaluate",
    "pack": "vaani_jax.cli.pack",
    "export": "vaani_jax.cli.export",
    "import": "vaani_jax.cli.import_",
    "plan": "vaani_jax.cli.plan",
    "plot": "vaani_jax.cli.plot",
    "config": "vaani_jax.cli.config",
}


NO_MEMORY = ("RESOURCE_EXHAUSTED", "std::bad_alloc")  # as XLA spells it
ROOM = ": make room there, or choose another place, and run the same command again"


def run_guarded(main: Callable[[Any], int], argument: Any) -> int:
    """Runs a command; what a user can mend becomes one line and status 1."""
    status = _guarded(main, argument)
    _drop_output()
    return status


def _guarded(main: Callable[[Any], int], argument: Any) -> int:
    # Orbax logs through absl, with traces of all its threads, what it then raises: we
    # say it once.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal has no character for is replaced there, and nowhere else.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        status = main(argument)
        sys.stdout.flush()  # here, what is not written is an error like any other
        return status
    except VaaniError as error:
        return _said(str(error))
    except BrokenPipeError:
        return 141  # whoever read it has left
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        hint = ROOM if error.errno in NO_ROOM else ""
        return _said(f"{error.strerror or error}{where}{hint}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        return _said(_too_large(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        return _said(_too_large(error))


def _said(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return 1


def _too_large(error: BaseException) -> str:
    return (
        f"not enough memory: {first_line(error)}; ask for less at a time (a smaller"
        " batch, context or model): vaani plan says what a step takes"
    )


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line, like any other error."""

    def error(self, message: str) -> NoReturn:
        raise VaaniError(f"{message}; {self.prog} --help lists what there is")


def _check_text(arguments: Sequence[str]) -> None:
    """Raises VaaniError for an argument of bytes that are no UTF-8."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise VaaniError(
                f"the argument {shown(argument)} holds bytes that are no UTF-8: write"
                " it in UTF-8"
            )


def _drop_output() -> None:
    """Lets go of output that can't be written: Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser(wanted: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands in `COMMANDS`.

    Args:
      wanted: those whose flags are read, which may mean to import much; all for None.
    """
    parser = Parser(prog="vaani", description="Ternary language models in JAX.")
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
    status = run_guarded(_run, sys.argv[1:] if arguments is None else arguments)
    processes = sys.modules.get("vaani_jax.devices.processes")
    if status and processes is not None:
        processes.leave(status)  # the others would wait for us
    return status


def _run(arguments: Sequence[str]) -> int:
    _check_text(arguments)
    parser = make_parser([name for name in COMMANDS if name in arguments])
    options, flags = parser.parse_known_args(arguments)
    taken = getattr(options.module, "FLAGS", None)
    unknown = flags
    if taken is not None:  # with values that stand apart: --config small
        unknown = [flag for flag in flags if flag.startswith("-")]
        unknown = [flag for flag in unknown if not flag.lstrip("-").startswith(taken)]
    if unknown:
        raise VaaniError(
            f"{options.command} has no argument {unknown[0]}:"
            f" vaani {options.command} --help lists what there is"
        )
    options.flags = flags
    status: int = options.module.run(options)
    return status
