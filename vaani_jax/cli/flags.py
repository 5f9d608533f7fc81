"""Flags of training: a config file, its overrides, and where the run is kept.

This is the only module that knows ml_collections.
"""

import dataclasses
import difflib
import pathlib
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags
from ml_collections.config_dict import placeholder

from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.model.config import RENAMED
from vaani_jax.settings import described
from vaani_jax.train.config import RETIRED, Config, from_dict


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
      name: a path; ``configs/small.py`` and ``small`` also name a shipped one.

    Raises VaaniError where there is none.
    """
    path = pathlib.Path(name)
    if path.is_file():
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
    raise VaaniError(f"no config file at {name}; with Vaani come {known}")


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
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    define: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", "", "where the run is kept", **define)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", **define)
    flags.DEFINE_integer("num_processes", None, "of this job", lower_bound=1, **define)
    flags.DEFINE_integer("process_id", None, "from 0", lower_bound=0, **define)
    flags.DEFINE_boolean("distributed", False, "join other processes", **define)
    path = str(find_config(_config_path(arguments)))
    given = ["train", *map(_in_full, _with_path(arguments, path))]
    told, sys.argv = sys.argv, given  # where ml_collections looks for overrides
    try:
        extra = values(given)[1:]
    except flags.Error as error:
        raise VaaniError(_one_line(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise VaaniError(_explain(path, arguments, error)) from None
    finally:
        sys.argv = told
    if extra:
        raise VaaniError(f"unexpected argument {extra[0]!r}: flags begin with --")
    return Invocation(
        config=from_config_dict(values.config),
        path=path,
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


def _with_path(arguments: Sequence[str], path: str) -> list[str]:
    """The arguments with the config file that was found."""
    result = list(arguments)
    for i, argument in enumerate(result):
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            result[i : i + 1 + (not equals)] = [f"--config={path}"]
            break
    return result


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


def _explain(path: str, arguments: Sequence[str], error: Exception) -> str:
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


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
