"""Settings: frozen dataclasses from nested plain values, checked key by key.

A key is written once, as a field made by `key`: its type, its default, and what it says
with its unit. Where it names something that people may add to, a table decides
(`named`).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from vaani_jax.errors import VaaniError

T = TypeVar("T")


def key(default: T, text: str) -> T:
    """A field of a settings dataclass.

    Args:
      default: an immutable value, or a frozen dataclass for a section.
      text: what it is, with its unit; shown by ``vaani config`` and in the docs.
    """
    field: Any = dataclasses.field(default=default, metadata={"text": text})
    return field


def as_in(settings: type, name: str) -> Any:
    """A field as it is in another settings dataclass: its default, and what it says."""
    found = {field.name: field for field in dataclasses.fields(settings)}[name]
    return key(found.default, found.metadata["text"])


def named(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a table; VaaniError, with what the table has, where there is none.

    Args:
      table: by name.
      name: what a config or a caller says.
      what: the key that says it, such as ``model.activation``.
    """
    if name not in table:
        known = ", ".join(map(str, table))
        raise VaaniError(f"{what} is {name!r}: it must be one of {known}")
    return table[name]


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """A frozen dataclass from nested plain values.

    Args:
      cls: the dataclass; fields that are dataclasses are sections of their own.
      values: a dict, as `dataclasses.asdict` gives it; what it lacks has its default.
      prefix: of its keys in messages, such as ``model.``.

    Raises VaaniError, naming the key, for unknown keys and for values of another type.
    """
    if not isinstance(values, dict):
        raise VaaniError(f"config section {prefix.rstrip('.')!r} must hold keys")
    fields = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise VaaniError(f"unknown config key {prefix}{key}{hint}")
        if dataclasses.is_dataclass(fields[key]):
            arguments[key] = build(fields[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _checked(fields[key], value, prefix + key)
    return cls(**arguments)


def _checked(kind: Any, value: Any, key: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        # A number, or one of a few words, or None.
        choices = typing.get_args(kind)
        if value is None and types.NoneType in choices:
            return None
        words = [w for k in choices for w in typing.get_args(k)]
        if isinstance(value, str) and value in words:
            return value
        number = next(k for k in choices if k in (int, float))
        try:
            return _checked(number, value, key)
        except VaaniError:
            others = "".join(f" or {w!r}" for w in words)
            others += " or None" if types.NoneType in choices else ""
            raise VaaniError(
                f"config key {key} is {value!r}: it must be a number{others}"
            ) from None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise VaaniError(
                f"config key {key} is {value!r}: it must be one of {known}"
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, str) for v in value
        ):
            raise VaaniError(f"config key {key} must be a tuple of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise VaaniError(
            f"config key {key} is {value!r}: it must be of type {kind.__name__}"
        )
    return value


def renamed(values: Any, names: Mapping[str, str], say: Callable[[str], None]) -> Any:
    """Nested values, with keys that have moved under their new names.

    Args:
      values: as for `build`; left as it is. None under an old name is no value.
      names: new dotted names by the old ones.
      say: receives a line for each key that was given by its old name.
    """
    for old, new in names.items():
        values, value = _taken(values, old.split("."))
        if value is not None:
            say(f"{old} is called {new} now")
            values = _with(values, new.split("."), value)
    return values


def without(
    values: Any, retired: Mapping[str, tuple[Any, str]], say: Callable[[str], None]
) -> Any:
    """Nested values without keys that are constants now.

    Args:
      values: as for `build`; left as it is. None is no value.
      retired: the constants, and where they are, by the dotted names of the keys.
      say: receives a line for each such key that was given.

    Raises VaaniError where one was given another value than the constant has.
    """
    for name, (constant, place) in retired.items():
        values, given = _taken(values, name.split("."))
        if given is None:
            continue
        if given != constant:
            raise VaaniError(
                f"{name} is no key any more: it is the constant {place}, {constant},"
                f" and can't be {given}"
            )
        say(f"{name} is no key any more: it is the constant {place}")
    return values


def _taken(values: Any, path: list[str]) -> tuple[Any, Any]:
    """Values without the key at ``path``, and what it had; None where there is none."""
    if not isinstance(values, dict) or path[0] not in values:
        return values, None
    rest = {name: value for name, value in values.items() if name != path[0]}
    if len(path) == 1:
        return rest, values[path[0]]
    inner, value = _taken(values[path[0]], path[1:])
    return {**values, path[0]: inner}, value


def _with(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Values with another one at ``path``."""
    if len(path) > 1:
        value = _with(values.get(path[0], {}), path[1:], value)
    return {**values, path[0]: value}


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys, dotted, whose values differ between two nested dicts."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b and not (
            isinstance(a, list | tuple)
            and isinstance(b, list | tuple)
            and tuple(a) == tuple(b)
        ):
            found[prefix + key] = (a, b)
    return found


def described(settings: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """Every `key` of a settings dataclass: dotted name, value and text, in order."""
    found: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found += described(value, f"{prefix}{field.name}.")
        elif field.metadata:
            found.append((prefix + field.name, value, field.metadata["text"]))
    return found
