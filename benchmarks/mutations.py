"""Damaged files: how bytes and JSON are changed; of benchmarks/faults.py."""

import copy
import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

# What a field of JSON may hold instead: other types, and numbers that nobody expects.
VALUES: list[Any] = [
    *(None, True, False, "", "x", [], {}, [[]], {"x": 1}, "nan", "\ud800", "a\nb"),
    *(0, -1, 1, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf")),
]
LENGTH = 8  # bytes before the header of a safetensors file


def flip(data: bytes, rng: random.Random) -> bytes:
    """Up to eight bits are flipped."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The end is gone."""
    return data[: rng.randrange(len(data))] if data else data


def zero(data: bytes, rng: random.Random) -> bytes:
    """A stretch is zero."""
    start, count = _stretch(data, rng)
    return data[:start] + bytes(count) + data[start + count :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A stretch is there twice."""
    start, count = _stretch(data, rng)
    return data[: start + count] + data[start:]


def noise(data: bytes, rng: random.Random) -> bytes:
    """A stretch is random."""
    start, count = _stretch(data, rng)
    return data[:start] + rng.randbytes(count) + data[start + count :]


def _stretch(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data)) if data else 0
    return start, min(len(data) - start, rng.choice([1, 8, 64, 4096]))


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    *(flip, truncate, zero, repeat, noise)
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields below a JSON value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:50]
    found = []
    for key, inner in items:
        found += [(*path, key), *_places(inner, (*path, key))]
    return found


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def change(value: Any, rng: random.Random) -> Any:
    """A JSON value with another field or two, one gone, or two that have swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = _places(value)
        if not places:
            return rng.choice(VALUES)
        path = rng.choice(places)
        place = _parent(value, path)
        kind = rng.randrange(6)
        if kind == 0:
            del place[path[-1]]
        elif kind == 1:
            other = rng.choice(places)
            if path[: len(other)] != other and other[: len(path)] != path:
                far = _parent(value, other)
                place[path[-1]], far[other[-1]] = far[other[-1]], place[path[-1]]
        elif kind == 2 and isinstance(place, dict):
            place[rng.choice(["x", "__class__", "py/object", ""])] = rng.choice(VALUES)
        elif kind == 3 and isinstance(place[path[-1]], int | float):
            place[path[-1]] = place[path[-1]] * rng.choice([-1, 2, 10**6, 10**12])
        else:
            place[path[-1]] = rng.choice(VALUES)
    return value


def change_json(data: bytes, rng: random.Random) -> bytes:
    """JSON with changed fields, or text of another shape."""
    kind = rng.randrange(20)
    if kind == 0:
        return b"[" * 100_000
    if kind == 1:
        return json.dumps(rng.choice(VALUES)).encode()
    if kind == 2:
        return b"\xef\xbb\xbf" + data
    return json.dumps(change(json.loads(data), rng)).encode()


def change_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another length of it."""
    length = int.from_bytes(data[:LENGTH], "little")
    header, rest = data[LENGTH : LENGTH + length], data[LENGTH + length :]
    if rng.randrange(4) == 0:
        wrong = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1])
        return wrong.to_bytes(LENGTH, "little") + header + rest
    header = change_json(header, rng)
    if rng.randrange(2):
        header += b" " * (-len(header) % LENGTH)
    return len(header).to_bytes(LENGTH, "little") + header + rest


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """The content of a file, damaged in a way that its kind invites."""
    if rng.randrange(3):
        try:
            if pathlib.PurePath(name).suffix == ".safetensors":
                return change_header(data, rng)
            json.loads(data)
        except ValueError:
            pass
        else:
            return change_json(data, rng)
    return rng.choice(BYTES)(data, rng)
