"""Settings: frozen dataclasses from nested plain values, checked key by key.

A key is written once, as a field made by `key`: its type, its default, what it says
with its unit, and the values that make sense (`check`). Where it names something that
people may add to, a table decides (`named`).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from vaani_jax.errors import VaaniError
from vaani_jax.paths import check_path
from vaani_jax.words import shown

T = TypeVar("T")

LARGEST_INT = 2**31 - 1  # steps, sizes and ids are int32
LARGEST_SEED = 2**32 - 1
LARGEST_FLOAT = 3.4e38  # numbers become float32


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that make sense for a key; None is no limit of that kind."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def allow(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """What they demand: "at least 1", "in [0, 1)"."""
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is None or high is None:
            words = {
                "at least": self.at_least,
                "above": self.above,
                "at most": self.at_most,
                "below": self.below,
            }
            return " and ".join(f"{w} {x}" for w, x in words.items() if x is not None)
        left, right = "[("[self.above is not None], "])"[self.below is not None]
        return f"in {left}{low}, {high}{right}"


def key(default: T, text: str, *, path: bool = False, **limits: float) -> T:
    """A field of a settings dataclass.

    Args:
      default: an immutable value, or a frozen dataclass for a section.
      text: what it is, with its unit; shown by ``vaani config`` and in the docs.
      path: whether it names a file or a folder.
      limits: of a number, see `Limits`.
    """
    metadata = {"text": text, "path": path, "limits": Limits(**limits)}
    field: Any = dataclasses.field(default=default, metadata=metadata)
    return field


def as_in(settings: type, name: str) -> Any:
    """A field as it is in another settings dataclass: default, text and limits."""
    found = {field.name: field for field in dataclasses.fields(settings)}[name]
    field: Any = dataclasses.field(default=found.default, metadata=found.metadata)
    return field


def check(settings: Any, prefix: str = "") -> None:
    """Raises VaaniError for values that the keys of a settings dataclass don't allow.

    For its ``__post_init__``, so that Python meets the same refusals as a config.

    Args:
      settings: an instance.
      prefix: of its keys, such as ``model.``.
    """
    for field in dataclasses.fields(settings):
        if not field.metadata:
            continue
        name, value = prefix + field.name, getattr(settings, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value, field.metadata["limits"])
        elif isinstance(value, str) and field.metadata["path"]:
            check_path(value, name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not _is_unicode(text):
                raise VaaniError(
                    f"{name} is {shown(value)}, which holds bytes that are no UTF-8:"
                    " write it in UTF-8"
                )


def _check_number(name: str, value: float, limits: Limits) -> None:
    if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
        finite = "a finite number" if limits == Limits() else f"finite and {limits}"
        beyond = " (float32 ends at 3.4e38)" if math.isfinite(value) else ""
        raise VaaniError(f"{name} is {value}: it must be {finite}{beyond}")
    if not limits.allow(value):
        raise VaaniError(f"{name} is {shown(value)}: it must be {limits}")
    if abs(value) > LARGEST_INT and isinstance(value, int) and limits.at_most is None:
        raise VaaniError(f"{name} is {shown(value)}: it must be at most {LARGEST_INT}")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def named(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a table; VaaniError, with what the table has, where there is none.

    Args:
      table: by name.
      name: what a config or a caller says.
      what: the key that says it, such as ``model.activation``.
    """
    if name not in table:
        known = ", ".join(map(str, table))
        raise VaaniError(f"{what} is {shown(name)}: it must be one of {known}")
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
            near = difflib.get_close_matches(str(key), fields, n=1)
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
                f"config key {key} is {shown(value)}: it must be a number{others}"
            ) from None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise VaaniError(
                f"config key {key} is {shown(value)}: it must be one of {known}"
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, str) for v in value
        ):
            raise VaaniError(f"config key {key} must be a tuple of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # One that no float holds stays for `check` to refuse.
        return float(value) if abs(value) <= LARGEST_FLOAT else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise VaaniError(
            f"config key {key} is {shown(value)}: it must be of type {kind.__name__}"
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
