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


# Bytes of the numbers in a GGUF file, by their kind; 8 is a text, 9 an array.
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Where the numbers of a whole GGUF file's header are, and how long each is.

    Lengths, counts, kinds, values, dimensions and offsets; of long arrays the first.
    """
    found: list[tuple[int, int]] = []
    at = 4

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == TEXT:
            text()
        elif kind == ARRAY:
            inner, count = number(4), number(8)
            for i in range(count):
                before = len(found)
                value(inner)
                if i > 20:
                    del found[before:]
        else:
            number(NUMBERS[kind])

    number(4)
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def change_gguf(data: bytes, rng: random.Random) -> bytes:
    """A GGUF file with other numbers in its header, or bytes of it flipped or gone."""
    numbers = gguf_numbers(data)
    end = sum(numbers[-1])
    if rng.randrange(4) == 0:
        return rng.choice(BYTES)(data[:end], rng) + data[end:]
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2])):
        at, size = rng.choice(numbers)
        old = int.from_bytes(found[at : at + size], "little")
        new = rng.choice(
            [
                *(0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63),
                *(2**64 - 1, old + 1, old - 1, old * 2, old // 2, old + 32, -old),
                rng.getrandbits(8 * size),
            ]
        )
        found[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(found)


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """The content of a file, damaged in a way that its kind invites."""
    if rng.randrange(3):
        try:
            if pathlib.PurePath(name).suffix == ".safetensors":
                return change_header(data, rng)
            if pathlib.PurePath(name).suffix == ".gguf":
                return change_gguf(data, rng)
            json.loads(data)
        except ValueError:
            pass
        else:
            return change_json(data, rng)
    return rng.choice(BYTES)(data, rng)
