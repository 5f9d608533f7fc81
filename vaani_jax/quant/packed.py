"""Every 2-bit layout of ternary weights, and matrices in eight bits.

Two bits hold ``weight + 1``, four of them a byte, the first in the lowest bits:
`joined` and `code`. Which four share a byte is the layout. Three are of packed models,
and `relayout` turns one into another:

* "tiles", of CPUs and of files: ``codes [ceil(N / 16), ceil(K / 16), 64]``. Byte
  ``4 (n % 16) + k % 4`` of block ``(n // 16, k // 16)`` holds the weights
  ``k % 16 = k % 4 + 4 i`` in bits ``2 i`` and ``2 i + 1``: a block read in one piece is
  four times sixteen outputs of four inputs, which is what vector units multiply.
* "rows", of GPUs: ``codes [N', 16 ceil(K / 64)]`` with N' the next multiple of 128.
  Byte ``(n, 4 b + j)`` holds the weights ``k = 16 b + j + 4 i`` in bits ``2 i`` and
  ``2 i + 1``: what a thread reads is of one output, and a mask on four bytes gives
  four codes that lie beside each other along K.
* "planes", of TPUs: ``codes [Q, N']`` with ``Q = 128 ceil(K / 512)`` and N' the next
  multiple of 128. Byte ``(r, n)`` holds the weights ``k = r + Q i``: a shift and a mask
  give a matrix in the shape that matrix units take.

Of two others, `pack_neighbors` is what devices send each other, and `pack_quarters`
what Hugging Face keeps.
"""

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.quant.rounding import EPSILON, LARGEST, to_codes
from vaani_jax.quant.weights import along_inputs

Array = jax.Array


Layout = Literal["tiles", "rows", "planes"]


TILE = 16  # inputs, and outputs, of a block


PADDING: dict[Layout, tuple[int, int]] = {
    "tiles": (TILE, TILE),
    "rows": (4 * TILE, 128),
    "planes": (512, 128),
}


@flax.struct.dataclass
class PackedTernary:
    """A ternary kernel [K, N] in two bits a weight.

    Invariants: every two bits are 0, 1 or 2, a weight plus one; weights that pad a
    shape up to whole blocks are 0; ``scale`` is positive.

    Attributes:
      codes: uint8, in one of the three orders above.
      scale: float32 [] per tensor or [N] per output channel; float32 or float16 for
        groups of inputs: [N' / 16, K / group, 16] beside tiles, where a block of
        outputs finds its scales together, else [K / group, N].
      shape: (K, N) without padding; static.
      layout: "tiles", "rows" or "planes"; static.
    """

    codes: Array
    scale: Array
    shape: tuple[int, int] = flax.struct.field(pytree_node=False)
    layout: Layout = flax.struct.field(pytree_node=False, default="tiles")

    @property
    def groups(self) -> int:
        """Groups of inputs that have scales of their own; 0 where there are none."""
        if self.scale.ndim < 2:
            return 0
        return self.scale.shape[1 if self.scale.ndim == 3 else 0]


@flax.struct.dataclass
class PackedRows:
    """A matrix [V, D], row by row in eight bits: ``codes * scale[:, None]``.

    Attributes:
      codes: int8 [V, D], in [-127, 127].
      scale: float32 [V], largest magnitude of the row / 127.
    """

    codes: Array
    scale: Array


def scale_of(packed: PackedTernary) -> Array:
    """Its scale as `ternarize` has it: float32 [], [N] or [K / group, N]."""
    scale = packed.scale.astype(jnp.float32)
    if scale.ndim < 3:
        return scale
    return scale.swapaxes(0, 1).reshape(scale.shape[1], -1)[:, : packed.shape[1]]


def joined(codes: Any) -> Any:
    """Codes 0 to 3 [4, ...], uint8, of numpy or JAX, as bytes [...]."""
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def code(packed: Any, i: Any) -> Any:
    """The i-th codes of bytes, which may be of a wider integer type."""
    return (packed >> (2 * i)) & 3


def pack_neighbors(weights: Array, axis: int) -> Array:
    """Weights in {-1, 0, 1}, four neighbors along ``axis`` in a byte."""
    codes = (weights + 1).astype(jnp.uint8)
    shape = codes.shape
    codes = codes.reshape(*shape[:axis], -1, 4, *shape[axis + 1 :])
    return joined(jnp.moveaxis(codes, axis + 1, 0))


def unpack_neighbors(packed: Array, axis: int) -> Array:
    """The inverse of `pack_neighbors`, int8."""
    codes = jnp.stack([code(packed, i) for i in range(4)], axis=axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 4
    return (codes.astype(jnp.int8) - 1).reshape(shape)


def pack_quarters(weights: np.ndarray) -> np.ndarray:
    """Weights [R, C] in {-1, 0, 1} as uint8 [R / 4, C]: rows R / 4 apart share a byte.

    Of ``transformers/integrations/bitnet.py``. R must be a multiple of 4.
    """
    codes = (weights + 1).astype(np.uint8)
    packed: np.ndarray = joined(codes.reshape(4, -1, codes.shape[1]))
    return packed


def unpack_quarters(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_quarters`, int8. Raises VaaniError for a code of 3."""
    return quarter_rows(packed, 0, 4 * len(packed))


def quarter_rows(packed: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows from ``start`` to ``stop`` of what `pack_quarters` packed, int8.

    Raises VaaniError for a code of 3 in them.
    """
    rows = np.arange(start, stop)
    shifts = (2 * (rows // len(packed))).astype(np.uint8)[:, None]
    codes = (packed[rows % len(packed)] >> shifts) & np.uint8(3)
    if (codes == 3).any():
        raise VaaniError("packed weights hold a code that is none of -1, 0 and 1")
    return codes.view(np.int8) - np.int8(1)


def pack(weights: Array, scale: Array, layout: Layout = "tiles") -> PackedTernary:
    """Packs ternary weights.

    Args:
      weights: [K, N] in {-1, 0, 1}, any dtype.
      scale: [], [N] or [K / group, N]; float16 is kept for groups.
      layout: the order of the codes.

    Raises:
      VaaniError: shapes that don't go together, or, where the weights are concrete,
        one that isn't ternary.
    """
    grouped = weights.ndim == scale.ndim == 2 and _fits_groups(weights, scale)
    if weights.ndim != 2 or not (scale.shape in ((), weights.shape[1:]) or grouped):
        raise VaaniError(
            f"can't pack weights {weights.shape} with a scale {scale.shape}: they must"
            " be [K, N] with a scale [], [N] or [K / group, N]"
        )
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights, np.float32)
        if not np.isin(values, (-1.0, 0.0, 1.0)).all():
            raise VaaniError("weights to pack must be -1, 0 or 1")
    k, n = weights.shape
    codes = (jnp.asarray(weights) + 1).astype(jnp.uint8)
    rows, columns = PADDING[layout]
    codes = jnp.pad(codes, ((0, -k % rows), (0, -n % columns)), constant_values=1)
    if layout == "planes":
        planes = codes.reshape(4, -1, codes.shape[1])
    elif layout == "rows":
        planes = codes.reshape(-1, 4, 4, codes.shape[1]).transpose(1, 3, 0, 2)
        planes = planes.reshape(*planes.shape[:2], -1)
    else:
        blocks = codes.reshape(codes.shape[0] // TILE, 4, 4, -1, TILE)
        planes = blocks.transpose(1, 3, 0, 4, 2)  # plane, n block, k block, n, k % 4
        planes = planes.reshape(4, *planes.shape[1:3], 64)
    scale = jnp.asarray(scale)
    if not grouped or scale.dtype != jnp.float16:
        scale = scale.astype(jnp.float32)
    if grouped and layout == "tiles":
        scale = jnp.pad(scale, ((0, 0), (0, -n % TILE)))
        scale = scale.reshape(len(scale), -1, TILE).swapaxes(0, 1)
    return PackedTernary(joined(planes), scale, (k, n), layout)


def _fits_groups(weights: Array, scale: Array) -> bool:
    (k, n), (groups, width) = weights.shape, scale.shape
    return width == n and groups > 0 and k % groups == 0


def tiles_of_rows(codes: np.ndarray) -> np.ndarray:
    """Codes of some outputs in layout "tiles", so that a kernel is packed in parts.

    Args:
      codes: [n, K] in {-1, 0, 1}, int8, an output a row; n a multiple of 16 but for the
        last part.

    Returns:
      uint8 [ceil(n / 16), ceil(K / 16), 64].
    """
    n, k = codes.shape
    padded = np.pad(codes, ((0, -n % TILE), (0, -k % TILE)))
    blocks = (padded + np.int8(1)).view(np.uint8).reshape(-1, TILE, -(-k // TILE), 4, 4)
    planes = blocks.transpose(3, 0, 2, 1, 4).reshape(4, len(blocks), -1, 64)
    packed: np.ndarray = joined(planes)
    return packed


def tiles_of_scales(scales: np.ndarray) -> np.ndarray:
    """Scales of the same outputs, [n, K / group], as [ceil(n / 16), K / group, 16]."""
    padded = np.pad(scales, ((0, -len(scales) % TILE), (0, 0)))
    return padded.reshape(-1, TILE, scales.shape[1]).swapaxes(1, 2)


def unpack(packed: PackedTernary, dtype: Any = jnp.int8) -> Array:
    """The weights [K, N] in {-1, 0, 1}."""
    k, n = packed.shape
    planes = jnp.stack([code(packed.codes, i) for i in range(4)])
    if packed.layout == "planes":
        weights = planes.reshape(-1, planes.shape[-1])
    elif packed.layout == "rows":
        words = planes.reshape(*planes.shape[:2], -1, 4)
        weights = words.transpose(2, 0, 3, 1).reshape(-1, planes.shape[1])
    else:
        blocks = planes.reshape(*planes.shape[:3], TILE, 4)
        weights = blocks.transpose(2, 0, 4, 1, 3)
        weights = weights.reshape(weights.shape[0] * TILE, -1)
    return (weights[:k, :n].astype(jnp.int8) - 1).astype(dtype)


def relayout(packed: PackedTernary, layout: Layout) -> PackedTernary:
    """The same weights in another order."""
    if packed.layout == layout:
        return packed
    scale = scale_of(packed).astype(packed.scale.dtype)
    return pack(unpack(packed), scale, layout)


def dequantized(packed: PackedTernary) -> Array:
    """The kernel [K, N] that packed weights stand for, float32: codes times scales."""
    scale = scale_of(packed)
    return unpack(packed, jnp.float32) * along_inputs(scale, packed.shape[0])


def take_columns(packed: PackedTernary, ids: Array) -> Array:
    """Columns [..., K], float32, of a packed kernel [K, N], at ids [...].

    Rows of a ternary embedding, whose kernel is that of the head.
    """
    k, _ = packed.shape
    block, lane = ids // TILE, ids % TILE
    if packed.layout == "planes":
        columns = jnp.moveaxis(jnp.take(packed.codes, ids, axis=1), 0, -1)
        planes = jnp.stack([code(columns, i) for i in range(4)], axis=-2)
    else:
        if packed.layout == "rows":
            words = jnp.take(packed.codes, ids, axis=0)
        else:
            words = jnp.take(packed.codes, block, axis=0)  # [..., K' / 16, 64]
            words = words.reshape(*words.shape[:-1], TILE, 4)
            words = jnp.take_along_axis(words, lane[..., None, None, None], axis=-2)
        words = words.reshape(*ids.shape, -1, 4)
        planes = jnp.stack([code(words, i) for i in range(4)], axis=-2)
    weights = planes.reshape(*ids.shape, -1)[..., :k].astype(jnp.float32) - 1.0
    scale = packed.scale.astype(jnp.float32)
    if scale.ndim == 0:
        return weights * scale
    if scale.ndim == 1:
        return weights * jnp.take(scale, ids)[..., None]
    if scale.ndim == 2:
        scale = jnp.moveaxis(jnp.take(scale, ids, axis=1), 0, -1)
    else:
        scale = jnp.take(scale, block, axis=0)  # [..., K / group, 16]
        scale = jnp.take_along_axis(scale, lane[..., None, None], axis=-1)[..., 0]
    return weights * jnp.repeat(scale, k // scale.shape[-1], axis=-1)


def pack_rows(matrix: Array) -> PackedRows:
    """Rounds a matrix [V, D] to eight bits, each row with a scale of its own."""
    matrix = matrix.astype(jnp.float32)
    bound = jnp.max(jnp.abs(matrix), axis=1)
    scale = jnp.maximum(bound, EPSILON) * (1.0 / LARGEST)
    return PackedRows(to_codes(matrix / scale[:, None]).astype(jnp.int8), scale)


def take_rows(rows: PackedRows, ids: Array) -> Array:
    """Rows [..., D], float32, at ids [...]."""
    codes = jnp.take(rows.codes, ids, axis=0).astype(jnp.float32)
    return codes * jnp.take(rows.scale, ids, axis=0)[..., None]
