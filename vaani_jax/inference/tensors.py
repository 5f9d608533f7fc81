"""Safetensors files, aligned when written and mapped when read."""

import json
import mmap
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from vaani_jax.errors import VaaniError

FORMAT = "vaani-packed-1"  # of the file with the arrays


ALIGNMENT = 64  # bytes; what JAX asks of memory that it uses in place


# -- safetensors, aligned and mapped ------------------------------------------------

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}


# What a number that is none, or JSON that goes too deep, raises.
NO_NUMBERS = (ValueError, ArithmeticError, RecursionError)


NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file whose data begins, and goes on, aligned.

    Arrays of whole multiples of 64 bytes come first, so all of those are aligned. (The
    `safetensors` package reads such files; it doesn't promise to write them.)
    """
    order = sorted(arrays, key=lambda name: (arrays[name].nbytes % ALIGNMENT > 0, name))
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    at = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).data)
        file.flush()
        os.fsync(file.fileno())


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
