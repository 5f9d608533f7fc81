"""How the kernels of a GPU cut their work: data by chip, found by trying.

`benchmarks/gpu.py --stages=products` tries others on a chip and prints what they take;
what is fastest there becomes a row of `TUNED`. A chip that has none takes an H100's.
"""

import dataclasses

import jax

from vaani_jax.devices.chips import chip_of


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
    """Of `gpu._matrix_kernel`; powers of two, but for ``splits``.

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


LONG = 1024  # bytes of codes of an output, and more
MANY = 8192  # outputs of all kernels of a call, and more


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What is fastest on a chip.

    Attributes:
      multiprocessors: programs that run at once, at least.
      short, long, many: of one row, by what `LONG` and `MANY` say.
      several: of several rows, up to `gpu.FEW_ROWS`.
      matrix: of more rows, before they are known: its rows are the most of a program.
    """

    multiprocessors: int
    short: VectorTiles
    long: VectorTiles
    many: VectorTiles
    several: VectorTiles
    matrix: MatrixTiles


H100 = Tuned(
    multiprocessors=132,
    # Layers of 2B4T, H100, 2026-11-27: 2.7 us for query, key and value, 2.4 for the
    # output, 5.1 for gate and up, 4.2 for down.
    short=VectorTiles(outputs=4, depth=128),
    long=VectorTiles(outputs=4, depth=512),
    many=VectorTiles(outputs=8, depth=128),
    # Not compared yet.
    several=VectorTiles(outputs=8, depth=128),
    matrix=MatrixTiles(),
)
TUNED = {"H100": H100, "H200": H100}  # the same multiprocessors


def tuned() -> Tuned:
    """What is fastest on the chip that JAX runs on."""
    chip = chip_of(jax.devices()[0].device_kind)
    return TUNED.get(chip.name, H100) if chip else H100


def vector_tiles(rows: int, depth: int, outputs: int) -> VectorTiles:
    """For M rows, bytes of codes of each output, and outputs of all kernels."""
    chip = tuned()
    if rows > 1:
        return chip.several
    if depth > LONG:
        return chip.long
    return chip.many if outputs > MANY else chip.short


def matrix_tiles(rows: int, depth: int, outputs: int) -> MatrixTiles:
    """For M rows, bytes of codes of each output, and outputs.

    K is split where there are fewer tiles than multiprocessors.
    """
    chip = tuned()
    height = 16
    while height < min(rows, chip.matrix.rows):
        height *= 2
    programs = -(-outputs // chip.matrix.outputs) * -(-rows // height)
    steps = -(-depth // chip.matrix.depth)
    splits = max(1, min(chip.multiprocessors // programs, steps))
    return dataclasses.replace(chip.matrix, rows=height, splits=splits)


def attention_tiles(groups: int, slots: int) -> AttentionTiles:
    """For rows times key-value heads, and slots of the cache.

    Slots are shared until two programs a multiprocessor have some to read at once.
    """
    tiles = AttentionTiles()
    parts = max(1, min(2 * tuned().multiprocessors // groups, slots // tiles.slots))
    return dataclasses.replace(tiles, parts=parts)
