"""Ternary matrices, found by looking, whatever numbers they are stored as.

A ternary model that was "unpacked" has weights in some float type, and every group of
them holds -s, 0 and s only: the product of a code and a scale rounds to one magnitude.
So equality to the bit tells such a group from any other, and the groups are the largest
ones that hold throughout. Everything goes by ranges of rows; nothing needs a matrix.

A group without a weight that isn't 0 fits any scale. Where it gets one, it is 1.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

# Which weights may share a scale, from the most: all, those of an output, or so many
# neighbors among the inputs of an output.
Grouping = int | str
TENSOR, CHANNEL = "tensor", "channel"
GROUPS = (256, 128, 64, 32)
GROUPINGS: tuple[Grouping, ...] = (TENSOR, CHANNEL, *GROUPS)


def block_of(columns: int) -> int:
    """The smallest group that can be found in rows of that many weights."""
    return next((size for size in GROUPS[::-1] if columns % size == 0), columns)


def split(values: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and scales of rows, or None where a block holds more than {-s, 0, s}.

    Bits are compared, as integers: those of floats without a sign have the same order.

    Args:
      values: float16 or float32 [n, columns].
      block: weights that share a scale, a divisor of the columns.

    Returns:
      Codes int8 [n, columns] in {-1, 0, 1} and scales [n, columns / block] of the same
      dtype, 0 where all codes are. Infinities are magnitudes like others; NaN is not.
    """
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
    sign = bits.dtype.type(1 << 8 * bits.dtype.itemsize - 1)
    parts = (bits & ~sign).reshape(len(bits), -1, block)
    tops = parts.max(axis=-1)
    used = parts != 0
    scales = tops.view(values.dtype)
    if not ((parts == tops[..., None]) | ~used).all() or np.isnan(scales).any():
        return None
    codes = used.view(np.int8).reshape(bits.shape)
    return codes - 2 * (codes & (bits >= sign)), scales


@dataclasses.dataclass
class Survey:
    """Which weights of a matrix share their scales.

    Attributes:
      columns: of the matrix.
      block: weights of a scale that `add` gets.
      fits: groupings that hold so far.
      half: whether every scale so far is a float16.
      largest: of all scales so far.
    """

    columns: int
    block: int
    fits: set[Grouping] = dataclasses.field(init=False)
    half: bool = dataclasses.field(init=False, default=True)
    largest: float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        sizes = {n for n in GROUPS if not self.columns % n}
        sizes = {n for n in sizes if not n % self.block or not self.block % n}
        self.fits = {TENSOR, CHANNEL, *sizes}

    def add(self, scales: np.ndarray) -> None:
        """Looks at the scales [n, columns / block] of some rows; 0 fits any."""
        scales = scales.astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16).astype(np.float32)
        self.half = self.half and bool((halves == scales).all())
        tops = scales.max(axis=-1)
        top = float(tops.max())
        for grouping in list(self.fits):
            if grouping == TENSOR:
                known = np.float32(max(self.largest, top))
                if not ((scales == known) | (scales == 0)).all() or (
                    self.largest not in (0.0, float(known))
                ):
                    self.fits.discard(grouping)
            else:
                shared = _shared(scales, self.block, self.columns, grouping)
                if not ((shared == scales) | (scales == 0)).all():
                    self.fits.discard(grouping)
        self.largest = max(self.largest, top)


def _shared(
    scales: np.ndarray, block: int, columns: int, grouping: Grouping
) -> np.ndarray:
    """The scale that each block [n, columns / block] shares with its group."""
    size = columns if grouping == CHANNEL else int(grouping)
    if size <= block:
        return scales
    parts = scales.reshape(len(scales), -1, size // block)
    return np.repeat(parts.max(axis=-1), size // block, axis=-1)


def coarsest(surveys: Iterable[Survey]) -> Grouping | None:
    """The grouping of most weights that holds in several matrices; None without one."""
    found = set(GROUPINGS)
    for survey in surveys:
        found &= survey.fits
    return next((one for one in GROUPINGS if one in found), None)


def regrouped(scales: np.ndarray, survey: Survey, grouping: Grouping) -> np.ndarray:
    """Scales [n, groups] of some rows, one for each group.

    Args:
      scales: [n, columns / block], as `Survey.add` got them.
      survey: of the whole matrix, where ``grouping`` fits.
      grouping: one scale for the matrix and one for a row are [n, 1].
    """
    if grouping == TENSOR:
        return np.full((len(scales), 1), survey.largest or 1.0, np.float32)
    size = survey.columns if grouping == CHANNEL else int(grouping)
    if size > survey.block:
        parts = scales.reshape(len(scales), -1, size // survey.block)
        scales = parts.max(axis=-1)
    elif size < survey.block:
        scales = np.repeat(scales, survey.block // size, axis=-1)
    return np.where(scales == 0, scales.dtype.type(1), scales)
