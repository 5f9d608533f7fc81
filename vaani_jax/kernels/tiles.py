"""How the kernels of a GPU cut their work: data, found by trying.

`benchmarks/gpu.py` tries others and prints what is fastest on a chip.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class VectorTiles:
    """Of `gpu._vector_kernel`; powers of two.

    Attributes:
      outputs: of a program, 128 at most.
      depth: bytes of a row of codes at a time.
      warps: of a program, 32 threads each.
    """

    outputs: int = 16
    depth: int = 128
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class MatrixTiles:
    """Of `gpu._matrix_kernel`; powers of two.

    Attributes:
      outputs: of a program, 128 at most.
      rows: of a program.
      depth: bytes of a row of codes at a time; 32 at least.
      splits: programs that share K.
      warps: of a program.
      stages: loads that are under way while others are multiplied.
    """

    outputs: int = 64
    rows: int = 64
    depth: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """Of `gpu_attention._kernel`.

    Attributes:
      slots: of the cache at a time; a power of two, 16 at least.
      parts: programs that share the slots of a row and head.
      warps: of a program.
    """

    slots: int = 128
    parts: int = 1
    warps: int = 4


PROGRAMS = 264  # two for each multiprocessor of an H100
SLOTS = 128  # at least, of a part: read at once


def attention_tiles(groups: int, slots: int) -> AttentionTiles:
    """For rows times key-value heads, and slots of the cache."""
    parts = max(1, min(PROGRAMS // groups, slots // SLOTS))
    return AttentionTiles(parts=parts)


def vector_tiles(rows: int, depth: int, outputs: int) -> VectorTiles:
    """For M rows, bytes of codes of each output, and outputs of all kernels.

    Of an H100, one row, layers of 2B4T: the fewer outputs there are, or the longer
    they are, the fewer of them make a program, down to the bytes of one load.
    """
    if rows > 1:
        return VectorTiles(outputs=8)
    if depth > 1024:
        return VectorTiles(outputs=4, depth=512)
    return VectorTiles(outputs=8 if outputs > 8192 else 4)


def matrix_tiles(rows: int, depth: int, outputs: int) -> MatrixTiles:
    """For M rows, bytes of codes of each output, and outputs."""
    height = 16
    while height < min(rows, 64):
        height *= 2
    return MatrixTiles(rows=height)
