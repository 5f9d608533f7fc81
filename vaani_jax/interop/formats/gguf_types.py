"""Types of tensors in GGUF files: a row each, with how its blocks are read and written.

A row of weights is a whole number of blocks, and a block is a few bytes: codes, and a
scale in float16. Ternary blocks come apart into codes in {-1, 0, 1} and scales,
exactly; a further type is a row of `TYPES` with its functions. Sources:
`ggml-common.h` and `ggml-quants.c` of ggml-org/llama.cpp, and of PrismML's fork for
142 and 143.

A scale may be negative in principle, and no quantizer writes one. The sign moves into
the codes, where it is exact: what llama.cpp computes from the file stays what it was.
Where a scale is 0, so are the codes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vaani_jax.errors import VaaniError

# Codes int8 [n, columns] in {-1, 0, 1}, and scales [n, blocks], positive or 0.
Ternary = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Type:
    """A type of tensor.

    Attributes:
      id: number in the file.
      name: as llama.cpp spells it.
      block: weights of a block.
      bytes: of a block.
      floats: blocks uint8 [n, blocks, bytes] as float32 [n, columns].
      scales: of a ternary type: blocks as float16 [n, blocks], as they are in the file.
      codes: of a ternary type: blocks as int8 [n, columns], before signs move. Raises
        ValueError for a code that is none of -1, 0 and 1.
      encode: codes int8 [n, columns] in {-1, 0, 1} and scales float16 [n, blocks] as
        bytes uint8 [n, blocks, bytes]; None where nothing writes the type.
    """

    id: int
    name: str
    block: int
    bytes: int
    floats: Callable[[np.ndarray], np.ndarray]
    scales: Callable[[np.ndarray], np.ndarray] | None = None
    codes: Callable[[np.ndarray], np.ndarray] | None = None
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def is_ternary(self) -> bool:
        """Whether its blocks are codes in {-1, 0, 1} and a scale."""
        return self.codes is not None

    def split(self, rows: np.ndarray) -> np.ndarray:
        """Rows of bytes [n, row bytes] as blocks [n, blocks, bytes]."""
        return rows.reshape(len(rows), -1, self.bytes)

    def values(self, rows: np.ndarray) -> np.ndarray:
        """Rows of bytes as floats [n, columns], as narrow as they are in the file."""
        if self.name == "F16":
            found: np.ndarray = np.ascontiguousarray(rows).view("<f2")
            return found
        return self.floats(self.split(rows))

    def ternary(self, rows: np.ndarray) -> Ternary:
        """Codes int8 [n, columns] and scales float16 [n, blocks] of a ternary type.

        Args:
          rows: uint8 [n, row bytes].

        Raises VaaniError for codes that are not ternary, and scales that aren't finite.
        """
        assert self.codes is not None
        blocks = self.split(rows)
        scales = self.magnitudes(rows)
        try:
            codes = self.codes(blocks)
        except ValueError:
            raise VaaniError(
                f"{self.name} with the code 3, which stands for twice the scale: these"
                " weights are not ternary"
            ) from None
        assert self.scales is not None
        signed = self.scales(blocks)
        if (signed <= 0).any():
            parts = codes.reshape(*scales.shape, self.block)
            codes = (parts * np.sign(signed).astype(np.int8)[..., None]).reshape(
                codes.shape
            )
        return codes, scales

    def magnitudes(self, rows: np.ndarray) -> np.ndarray:
        """The scales of `ternary` alone, which are cheap."""
        assert self.scales is not None
        scales = np.abs(self.scales(self.split(rows)))
        if not np.isfinite(scales).all():
            raise VaaniError(f"{self.name} with scales that are not finite")
        return scales


# -- Floats -----------------------------------------------------------------------


def _halves(part: np.ndarray) -> np.ndarray:
    """Bytes [..., 2] as float16 [...]."""
    found: np.ndarray = np.ascontiguousarray(part).view("<f2")[..., 0]
    return found


def _f32(blocks: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.ascontiguousarray(blocks).view("<f4")[..., 0]
    return found


def _f16(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks).astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(blocks).view("<u2")[..., 0].astype(np.uint32) << 16
    found: np.ndarray = wide.view(np.float32)
    return found


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scales = _halves(blocks[..., :2]).astype(np.float32)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    with np.errstate(all="ignore"):  # whoever reads it looks for what isn't finite
        return (codes * scales[..., None]).reshape(len(blocks), -1)


def _encode_f16(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    values: np.ndarray = codes * scales.astype("<f2")  # blocks of one weight
    return values[..., None].view(np.uint8)


def _encode_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    blocks = np.empty((*scales.shape, 34), np.uint8)
    blocks[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    blocks[..., 2:] = codes.reshape(*scales.shape, 32).view(np.uint8)
    return blocks


# -- Two bits a weight ------------------------------------------------------------


def _check_two_bits(packed: np.ndarray) -> None:
    if (packed & (packed >> 1) & 0x55).any():
        raise ValueError


def _spread(packed: np.ndarray) -> np.ndarray:
    """Bytes [...] as their four weights, the first in the lowest bits: [..., 4]."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    found: np.ndarray = (packed[..., None] >> shifts & 3).view(np.int8) - np.int8(1)
    return found


def _joined(parts: np.ndarray) -> np.ndarray:
    """The inverse of `_spread`."""
    codes = (parts + 1).astype(np.uint8)
    found: np.ndarray = (
        codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    )
    return found


def _first_two(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks[..., :2])


def _last_two(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks[..., -2:])


def _neighbors(blocks: np.ndarray) -> np.ndarray:
    """Q2_0 and PQ2_0: a scale, then bytes of four neighbors each."""
    packed = blocks[..., 2:]
    _check_two_bits(packed)
    return _spread(packed).reshape(len(blocks), -1)


def _encode_neighbors(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    packed = _joined(codes.reshape(*scales.shape, -1, 4))
    return np.concatenate(
        [scales.astype("<f2")[..., None].view(np.uint8), packed], axis=-1
    )


def _tq2_0(blocks: np.ndarray) -> np.ndarray:
    """Two halves of 128: byte ``m`` of 32 holds the weights ``m + 32 i``."""
    packed = blocks[..., :64].reshape(*blocks.shape[:-1], 2, 32)
    _check_two_bits(packed)
    return _spread(packed).swapaxes(-1, -2).reshape(len(blocks), -1)


def _encode_tq2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    parts = codes.reshape(*scales.shape, 2, 4, 32).swapaxes(-1, -2)
    packed = _joined(parts).reshape(*scales.shape, 64)
    return np.concatenate(
        [packed, scales.astype("<f2")[..., None].view(np.uint8)], axis=-1
    )


# -- Five trits a byte ------------------------------------------------------------

# Stages of a block: how many bytes, and how many trits each has. The trits n of all
# bytes of a stage come before the trits n + 1; a scale comes last.
TQ1_0 = ((32, 5), (16, 5), (4, 4))
PTQ1_0 = ((16, 5), (8, 5), (2, 4))

# A byte b holds its trits as the digits of the fraction b / 256: int8 [256, 5].
_POWERS = 3 ** np.arange(5)
_TRITS = ((np.arange(256)[:, None] * _POWERS % 256 * 3 >> 8) - 1).astype(np.int8)


def _trits(
    stages: tuple[tuple[int, int], ...],
) -> Callable[[np.ndarray], np.ndarray]:
    def codes(blocks: np.ndarray) -> np.ndarray:
        found, at = [], 0
        for size, each in stages:
            part = _TRITS[blocks[..., at : at + size], :each].swapaxes(-1, -2)
            found.append(part.reshape(*blocks.shape[:-1], size * each))
            at += size
        return np.concatenate(found, axis=-1).reshape(len(blocks), -1)

    return codes


def _encode_trits(
    stages: tuple[tuple[int, int], ...],
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def encode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        parts = codes.reshape(*scales.shape, -1)
        found, at = [], 0
        for size, each in stages:
            digits = parts[..., at : at + size * each] + 1
            digits = digits.reshape(*scales.shape, each, size).astype(np.int64)
            total = (digits * _POWERS[4::-1][:each, None]).sum(axis=-2)
            # The smallest byte whose fraction is not below total / 243.
            found.append(((total * 256 + 242) // 243).astype(np.uint8))
            at += size * each
        found.append(scales.astype("<f2")[..., None].view(np.uint8))
        return np.concatenate(found, axis=-1)

    return encode


# -- The table --------------------------------------------------------------------


def _ternary_type(
    number: int,
    name: str,
    block: int,
    size: int,
    scales: Callable[[np.ndarray], np.ndarray],
    codes: Callable[[np.ndarray], np.ndarray],
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Type:
    def floats(blocks: np.ndarray) -> np.ndarray:
        found = made.ternary(blocks.reshape(len(blocks), -1))
        wide = np.repeat(found[1].astype(np.float32), block, axis=-1)
        return found[0] * wide

    made = Type(number, name, block, size, floats, scales, codes, encode)
    return made


TYPES: dict[str, Type] = {
    row.name: row
    for row in (
        Type(0, "F32", 1, 4, _f32),
        Type(1, "F16", 1, 2, _f16, encode=_encode_f16),
        Type(30, "BF16", 1, 2, _bf16),
        Type(8, "Q8_0", 32, 34, _q8_0, encode=_encode_q8_0),
        _ternary_type(
            *(34, "TQ1_0", 256, 54, _last_two, _trits(TQ1_0)), _encode_trits(TQ1_0)
        ),
        _ternary_type(35, "TQ2_0", 256, 66, _last_two, _tq2_0, _encode_tq2_0),
        _ternary_type(42, "Q2_0", 64, 18, _first_two, _neighbors, _encode_neighbors),
        _ternary_type(142, "PQ2_0", 128, 34, _first_two, _neighbors),
        _ternary_type(143, "PTQ1_0", 128, 28, _last_two, _trits(PTQ1_0)),
    )
}

BY_ID = {row.id: row for row in TYPES.values()}

# What old files hold under the number of Q2_0: blocks of 128 weights.
LEGACY = (128, 34)

# Types that are refused, by the names that people know them by.
OTHERS = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"},
    **{23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 36: "I2_S", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}


def named(number: int) -> Type:
    """The type with a number; VaaniError, by its name, for one that isn't read."""
    if number in BY_ID:
        return BY_ID[number]
    known = ", ".join(TYPES)
    if number == 36:
        raise VaaniError(
            "of type I2_S, which microsoft/BitNet's fork of llama.cpp alone reads:"
            " import the model's Hugging Face folder"
        )
    label = OTHERS.get(number, f"number {number}, which llama.cpp does not know")
    raise VaaniError(f"of type {label}: {known} can be imported")
