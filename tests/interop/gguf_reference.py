"""GGUF files as others write them, and types decoded one weight after another."""

import struct
from typing import Any

import gguf
import numpy as np

from vaani_jax.interop.tokenizers import to_gguf
from vaani_jax.text.tokenizers import Tokenizer

# Number, weights and bytes of a block.
Q2_0, PQ2_0, PTQ1_0 = (42, 64, 18), (142, 128, 34), (143, 128, 28)
LEGACY = (42, 128, 34)


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def decode_q2(data: bytes, block: int) -> list[float]:
    """Q2_0 and PQ2_0, a weight at a time, as `dequantize_row_q2_0` has it."""
    found = []
    size = 2 + block // 4
    for at in range(0, len(data), size):
        d = half(data[at : at + 2])
        for j in range(block):
            code = data[at + 2 + j // 4] >> 2 * (j % 4) & 3
            found.append((code - 1) * d)
    return found


def decode_ptq1_0(data: bytes) -> list[float]:
    """Places of the trits as section 8 of the notes on formats has them."""
    found = []
    for at in range(0, len(data), 28):
        block, values = data[at : at + 28], [0.0] * 128
        d = half(block[26:28])

        def trit(byte: int, n: int) -> int:
            return (byte * 3**n % 256) * 3 // 256 - 1

        for n in range(5):
            for m in range(16):
                values[16 * n + m] = trit(block[m], n) * d
            for m in range(8):
                values[80 + 8 * n + m] = trit(block[16 + m], n) * d
        for n in range(4):
            for m in range(2):
                values[120 + 2 * n + m] = trit(block[24 + m], n) * d
        found += values
    return found


def q2_blocks(codes: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """Bytes [rows, row bytes] of Q2_0 or PQ2_0, a weight at a time."""
    rows, columns = codes.shape
    found = np.zeros((rows, columns // block * (2 + block // 4)), np.uint8)
    for r in range(rows):
        data = bytearray()
        for b in range(columns // block):
            data += struct.pack("<e", float(scales[r, b]))
            part = bytearray(block // 4)
            for j in range(block):
                part[j // 4] |= (int(codes[r, b * block + j]) + 1) << 2 * (j % 4)
            data += part
        found[r] = np.frombuffer(bytes(data), np.uint8)
    return found


def trits(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes [rows, row bytes] of PTQ1_0: those whose trits are the weights' codes."""
    rows, columns = codes.shape
    found = np.zeros((rows, columns // 128 * 28), np.uint8)
    for r in range(rows):
        for b in range(columns // 128):
            part = codes[r, 128 * b : 128 * b + 128].astype(int) + 1
            for i in range(26):
                if i < 16:
                    digits = [part[16 * n + i] for n in range(5)]
                elif i < 24:
                    digits = [part[80 + 8 * n + i - 16] for n in range(5)]
                else:
                    digits = [part[120 + 2 * n + i - 24] for n in range(4)] + [0]
                total = sum(digit * 3 ** (4 - n) for n, digit in enumerate(digits))
                found[r, 28 * b + i] = -(-total * 256 // 243)
            scale = struct.pack("<e", float(scales[r, b]))
            found[r, 28 * b + 26 : 28 * b + 28] = list(scale)
    return found


def pairs(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter orders them for `llama`."""
    shape = weights.shape
    parts = weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return parts.swapaxes(1, 2).reshape(shape)


def write(
    path: Any,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a file with PyPI's gguf.

    Args:
      keys: by names that begin with the architecture unless they begin with ".".
      tensors: by their names; arrays of floats, or tuples of bytes [rows, row bytes]
        and of what they are: number, weights and bytes of a block.
      tokenizer: of the file; none where ``keys`` has one.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        name = key[1:] if key.startswith(".") else f"{architecture}.{key}"
        add: Any = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }.get(type(value), writer.add_array)
        add(name, value)
    if tokenizer is not None:
        found = to_gguf(tokenizer, len(tensors["token_embd.weight"]))
        writer.add_tokenizer_model(found.model)
        writer.add_tokenizer_pre(found.pre)
        writer.add_token_list(found.tokens)
        writer.add_token_types(found.types)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            data, (number, block, size) = value
            shape = (*data.shape[:-1], data.shape[-1] // size * block)
            typed: Any = number
            writer.add_tensor(name, data.view(np.int8), shape, typed)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
