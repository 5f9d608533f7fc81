"""Safetensors files, aligned when written and mapped when read."""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vaani_jax.errors import VaaniError

FORMAT = "vaani-packed-1"  # of the file with the arrays


ALIGNMENT = 64  # bytes; what JAX asks of memory that it uses in place


# -- safetensors, aligned and mapped ------------------------------------------------

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


# What a number that is none, or JSON that goes too deep, raises.
NO_NUMBERS = (ValueError, ArithmeticError, RecursionError)


NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """Writes a safetensors file, each array in one part or several.

    Its data begins, and goes on, aligned: arrays of whole multiples of 64 bytes come
    first. (The `safetensors` package reads such files; it doesn't promise to write
    them.) As a context manager, it ends with everything on disk, or an error.

    Attributes:
      order: of the arrays in the file; any order of writing will do.
    """

    def __init__(
        self,
        path: pathlib.Path,
        arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    ) -> None:
        """Makes the file.

        Args:
          path: of the file.
          arrays: shape and dtype of each array, by name.
        """
        sizes = {
            name: math.prod(shape) * dtype.itemsize
            for name, (shape, dtype) in arrays.items()
        }
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
        self._done = dict.fromkeys(sizes, 0)  # bytes written of each
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name in sorted(sizes, key=lambda name: (sizes[name] % ALIGNMENT > 0, name)):
            shape, dtype = arrays[name]
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + sizes[name]],
            }
            self._places[name] = at, sizes[name]
            at += sizes[name]
        self.order = list(self._places)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, part: np.ndarray) -> None:
        """Writes the next part of an array."""
        begin, size = self._places[name]
        done = self._done[name]
        assert done + part.nbytes <= size, name
        self._file.seek(self._start + begin + done)
        self._file.write(np.ascontiguousarray(part).data)
        self._done[name] = done + part.nbytes

    def done(self, name: str) -> int:
        """How many bytes of an array are written."""
        return self._done[name]

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                short = [n for n, at in self._done.items() if at != self._places[n][1]]
                assert not short, short
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_tensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file of arrays that are there: see `TensorWriter`."""
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    with TensorWriter(path, shapes) as writer:
        for name in writer.order:
            writer.write(name, arrays[name])


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Maps a safetensors file: read-only arrays by name, nothing read yet.

    Raises:
      VaaniError: the file is missing, cut short, or not of this format.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise VaaniError(f"can't read {path}: {error}") from None
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    arrays = {}
    try:
        if start > len(data):
            raise ValueError("its header is cut short")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            first, last = map(int, entry["data_offsets"])
            count = 1
            for size in shape:
                if size < 0:
                    raise ValueError(f"{name} has a negative size")
                count *= size
            if not 0 <= first <= last <= len(data) - start:
                raise ValueError(f"{name} lies beyond its end: it is cut short")
            if last - first != count * dtype.itemsize:
                raise ValueError(f"{name} has another length than its shape")
            if count == 0:
                arrays[name] = np.zeros(shape, dtype)
                continue
            flat = np.frombuffer(data, dtype, count, start + first)
            arrays[name] = flat.reshape(shape)
    except (LookupError, TypeError, AttributeError, *NO_NUMBERS) as error:
        raise VaaniError(f"{path} is not a whole safetensors file: {error}") from None
    return arrays
