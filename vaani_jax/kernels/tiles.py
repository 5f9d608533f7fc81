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


def vector_tiles(rows: int, depth: int, outputs: int) -> VectorTiles:
    """For M rows, bytes of codes of each output, and outputs of all kernels."""
    del rows, depth, outputs
    return VectorTiles()


def matrix_tiles(rows: int, depth: int, outputs: int) -> MatrixTiles:
    """For M rows, bytes of codes of each output, and outputs."""
    height = 16
    while height < min(rows, 64):
        height *= 2
    return MatrixTiles(rows=height)
