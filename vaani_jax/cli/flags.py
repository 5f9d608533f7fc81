"""Flags of training: a config file, its overrides, and where the run is kept.

This is the only module that knows ml_collections.
"""

import dataclasses
import difflib
import importlib.machinery
import pathlib
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags
from ml_collections.config_dict import placeholder

from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.model.config import RENAMED
from vaani_jax.paths import check_path, local
from vaani_jax.settings import described
from vaani_jax.train.config import RETIRED, Config, from_dict

MOST_PROCESSES = 2**20


def default_config() -> ConfigDict:
    """Every key with its default, for config files to change; locked.

    It takes keys of earlier versions too: by the names that they had, and those that
    are constants now.
    """
    result = _config_dict(Config())
    kinds = {name: type(value) for name, value, _ in described(Config())}
    older = {old: kinds[new] for old, new in RENAMED.items()}
    older |= {old: type(value) for old, (value, _) in RETIRED.items()}
    for old, kind in older.items():
        *sections, name = old.split(".")
        section = result
        for part in sections:
            section = section[part]
        section[name] = placeholder(kind)
    return result.lock()


def _config_dict(settings: Any) -> ConfigDict:
    kinds = typing.get_type_hints(type(settings))
    result = ConfigDict()
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), kinds[field.name]
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif typing.get_origin(kind) in (typing.Union, types.UnionType):
            # ConfigDict would keep the type of the default, which is one of several.
            number = next(k for k in typing.get_args(kind) if k in (int, float))
            value = (
                placeholder(number)
                if value is None
                else FieldReference(value, field_type=object)
            )
        result[field.name] = value
    return result


def find_config(name: str) -> pathlib.Path:
    """A config file: as named, or one of those that come with Vaani.

    Args:
      name: a path, of a pipe too; ``configs/small.py`` and ``small`` also name a
        shipped one.

    Raises VaaniError where there is none.
    """
    path = local(name or ".", "--config")
    if path.exists() and not path.is_dir():
        return path
    package = pathlib.Path(__file__).parents[1]
    shipped = package / "configs"
    if not shipped.is_dir():  # a checkout
        shipped = package.parent / "configs"
    if path.parent in (pathlib.Path("."), pathlib.Path("configs")):
        candidate = shipped / f"{path.stem}.py"
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.stem for file in shipped.glob("*.py")))
    where = f" at {name}" if name else ""
    raise VaaniError(f"no config file{where}; with Vaani come {known}")


class _Source(importlib.machinery.SourceFileLoader):
    """Runs a file as it is now: no compiled copy is looked for, and none is kept."""

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def load_config(path: pathlib.Path) -> ConfigDict:
    """What the function ``get_config`` of a config file returns.

    Raises VaaniError, with the line of the file, for whatever goes wrong in it.
    """
    module = types.ModuleType("vaani_config")
    module.__file__ = str(path)
    loader = _Source(module.__name__, str(path))
    # Where what the file defines is looked for, such as the module of a dataclass.
    sys.modules[module.__name__] = module
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise VaaniError(
                f"config file {path} defines no get_config(): see configs/small.py"
            )
        values = module.get_config()
    except VaaniError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file may do
        raise VaaniError(_of_file(path, error)) from None
    if not isinstance(values, ConfigDict):
        raise VaaniError(
            f"config file {path}: get_config() must return an ml_collections.ConfigDict"
            " (it may begin with `config = default_config()` and end with"
            f" `return config`); it returned {type(values).__name__}"
        )
    return values


def _of_file(path: pathlib.Path, error: BaseException) -> str:
    """One line for an error that running a config file raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    reason = _one_line(error)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, reason = [error.lineno], f"{error.msg}"
    where = f"config file {path}" + (f", line {lines[-1]}" if lines else "")
    if isinstance(error, ModuleNotFoundError):
        reason += f": install {error.name}, or remove the import"
    elif not isinstance(error, SyntaxError | ImportError | AttributeError):
        reason = f"{type(error).__name__}: {reason}"
    return f"{where}: {reason}"


def from_config_dict(values: ConfigDict) -> Config:
    """Validates what a config file returned."""
    if not isinstance(values, ConfigDict):
        raise VaaniError("get_config() must return an ml_collections.ConfigDict")
    return from_dict(values.to_dict(), notify)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command line says.

    Attributes:
      config: the run.
      path: of the config file.
      workdir: where the run is kept; "" where not given.
      coordinator, num_processes, process_id, distributed: see `distributed.join`.
    """

    config: Config
    path: str
    workdir: str
    coordinator: str
    num_processes: int | None
    process_id: int | None
    distributed: bool


def config_from_flags(arguments: Sequence[str]) -> Invocation:
    """Reads ``--config=FILE --config.KEY=VALUE ... --workdir=DIR`` and the like.

    Raises:
      VaaniError: anything wrong with a flag or with the file.
    """
    path = find_config(_config_path(arguments))
    given = ["train", *map(_in_full, _without_path(arguments))]
    file = load_config(path)
    values = flags.FlagValues()
    define: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", "", "where the run is kept", **define)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", **define)
    whole: dict[str, Any] = {**define, "upper_bound": MOST_PROCESSES}
    flags.DEFINE_integer("num_processes", None, "of this job", lower_bound=1, **whole)
    flags.DEFINE_integer("process_id", None, "from 0", lower_bound=0, **whole)
    flags.DEFINE_boolean("distributed", False, "join other processes", **define)
    try:
        # Finds overrides among the arguments, and sets them, before all other flags.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python, about what a value looks like
            config_flags.DEFINE_config_dict("config", file, sys_argv=given, **define)
            extra = values(given)[1:]
    except flags.Error as error:
        raise VaaniError(_one_line(error)) from None
    except Exception as error:  # the parsers of values raise many types
        raise VaaniError(_explain(path, given, error)) from None
    if extra:
        raise VaaniError(f"unexpected argument {extra[0]!r}: flags begin with --")
    check_path(values.workdir, "--workdir")
    return Invocation(
        config=from_config_dict(values.config),
        path=str(path),
        workdir=values.workdir,
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
        distributed=values.distributed,
    )


def _config_path(arguments: Sequence[str]) -> str:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            if not equals:
                value = arguments[i + 1] if i + 1 < len(arguments) else ""
            return value
    raise VaaniError("which config? Say --config=configs/small.py, for example")


def _without_path(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that name the config file."""
    left: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name != "config":
            left.append(argument)
        elif not equals:
            next(rest, "")
    return left


def _in_full(argument: str) -> str:
    """``--config.dim=256`` as ``--config.model.dim=256``: the one key of that name.

    So the names of the original work on the command line, in whatever section they are.
    """
    name, equals, value = argument.partition("=")
    prefix, dot, key = name.lstrip("-").partition(".")
    if not argument.startswith("-") or prefix != "config" or not dot or "." in key:
        return argument
    keys = [dotted for dotted, _, _ in described(Config())]
    found = [dotted for dotted in keys if dotted.rpartition(".")[2] == key]
    if key in keys or len(found) != 1:
        return argument
    return f"--config.{found[0]}{equals}{value}"


def _explain(path: pathlib.Path, arguments: Sequence[str], error: Exception) -> str:
    """One line for an error that came out of a config file or an override."""
    known = Config().to_dict()
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config."):
            keys, node = name.split(".")[1:], known
            for i, key in enumerate(keys):
                if not isinstance(node, dict) or key not in node:
                    options = node if isinstance(node, dict) else {}
                    near = difflib.get_close_matches(key, options, n=1)
                    hint = ".".join([*keys[:i], *near])
                    return f"unknown config key {'.'.join(keys)}" + (
                        f"; did you mean {hint}?" if near else ""
                    )
                node = node[key]
    return f"config file {path}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
