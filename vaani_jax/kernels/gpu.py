"""Products with packed weights on GPUs: Pallas, through Triton.

Both kernels take the codes in rows (`quant/packed.py`), where four bytes hold sixteen
weights of one output, and their i-th plane, ``(word >> 2 i) & 0x03030303``, is four
codes in four bytes, beside each other along K as the activations are. Inline assembly
takes the four bytes as the one register that they are.

* Few rows (`_vector_kernel`), as when decoding, are bound by memory: a program takes
  some outputs and all of K, its threads read sixteen bytes of a row of codes each, and
  ``dp4a`` multiplies a plane, four codes, with four activations. One launch computes
  all projections of an input. Codes are weights plus one: what that adds, the sum of
  the activations, is taken off at the end.
* Many rows (`_matrix_kernel`) are bound by arithmetic: codes become int8 in registers,
  and tensor cores multiply them. Where there are fewer tiles than multiprocessors, K is
  split over programs, too.

All sums are of integers, so any order gives the same bits.

Elsewhere than on a GPU the kernels run in Pallas's interpreter, which is how the tests
compare them with the reference on a CPU.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from vaani_jax.kernels.tiles import MatrixTiles, VectorTiles, matrix_tiles, vector_tiles
from vaani_jax.quant.activations import integers
from vaani_jax.quant.packed import PackedTernary, code, relayout
from vaani_jax.quant.rounding import LARGEST

Array = jax.Array

FEW_ROWS = 8  # up to which a product is one of vectors


def ternary_matmul(
    x: Array, packed: Sequence[PackedTernary], activation_range: Array | None
) -> list[Array]:
    """See `vaani_jax.kernels.ternary_matmul`: x [M, K] float32, [M, N] float32 each."""
    kernels = [relayout(kernel, "rows") for kernel in packed]
    q, bound = integers(x, activation_range)
    rows, inputs = x.shape
    depth = kernels[0].codes.shape[1]
    # [4, M, depth]: what meets the i-th plane of each byte.
    q = jnp.pad(q.astype(jnp.int8), ((0, 0), (0, 4 * depth - inputs)))
    q = q.reshape(rows, depth // 4, 4, 4).transpose(2, 0, 1, 3).reshape(4, rows, depth)
    if rows <= FEW_ROWS:
        return _vectors(q, bound, kernels)
    return [_matrix(q, bound, kernel) for kernel in kernels]


def _factors(bound: Array, kernel: PackedTernary) -> tuple[Array, Array]:
    """[M, 1] and [1] or [N]: their product is `quant.product.output_scale`."""
    part = 1.0 / LARGEST
    if kernel.scale.ndim == 0:
        return bound, (kernel.scale * part)[None]
    return bound * part, kernel.scale


def _interpreted() -> bool:
    return jax.default_backend() != "gpu"


# -- Few rows -----------------------------------------------------------------------


def _vectors(q: Array, bound: Array, kernels: Sequence[PackedTernary]) -> list[Array]:
    _, rows, depth = q.shape
    tiles = vector_tiles(rows, depth, sum(kernel.shape[1] for kernel in kernels))
    # A program is of one kernel: those of the second follow those of the first.
    starts, end = [], 0
    for kernel in kernels:
        starts.append(end)
        end += -(-kernel.shape[1] // tiles.outputs)
    arguments: list[Array] = [q]
    for kernel in kernels:
        arguments += [kernel.codes, *_factors(bound, kernel)]
    call = pl.pallas_call(
        functools.partial(_vector_kernel, starts=starts, tiles=tiles),
        grid=(end,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, kernel.shape[1]), jnp.float32)
            for kernel in kernels
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=_interpreted(),
        name="ternary_vectors",
    )
    return list(call(*arguments))


def _vector_kernel(
    q_ref: Any, *refs: Any, starts: Sequence[int], tiles: VectorTiles
) -> None:
    """Some outputs of one of the kernels, for all rows."""
    program = pl.program_id(0)
    inputs, outputs = refs[: 3 * len(starts)], refs[3 * len(starts) :]
    for i, (start, out_ref) in enumerate(zip(starts, outputs, strict=True)):
        mine = program >= start
        if i + 1 < len(starts):
            mine &= program < starts[i + 1]
        run = functools.partial(
            _vector_tile,
            q_ref,
            *inputs[3 * i : 3 * i + 3],
            out_ref,
            (program - start) * tiles.outputs,
            tiles,
        )
        if len(starts) == 1:
            run()
        else:
            pl.when(mine)(run)


def _vector_tile(
    q_ref: Any,
    codes_ref: Any,
    row_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    first: Array,
    tiles: VectorTiles,
) -> None:
    rows, width = out_ref.shape
    depth = codes_ref.shape[1]
    outputs = first + jnp.arange(tiles.outputs, dtype=jnp.int32)
    tile = (tiles.outputs, tiles.depth)
    totals = [jnp.zeros(tile, jnp.int32) for _ in range(rows)]
    for begin in range(0, depth, tiles.depth):
        columns = begin + jnp.arange(tiles.depth, dtype=jnp.int32)[None, :]
        inside = columns < depth
        codes = plt.load(codes_ref.at[outputs[:, None], columns], mask=inside, other=0)
        # As wide as the codes: then threads read what they multiply, and nothing has
        # to be handed on.
        columns = jnp.broadcast_to(columns, tile)
        for plane in range(4):
            weights = _plane(codes, plane)
            for row in range(rows):
                q = plt.load(q_ref.at[plane, row, columns], mask=inside, other=0)
                totals[row] = _dp4a(weights, q, totals[row])
    whole = jnp.arange(pl.next_power_of_2(depth), dtype=jnp.int32)
    ones = jnp.ones(whole.shape, jnp.int8)
    offsets = []
    for row in range(rows):
        total = jnp.zeros(whole.shape, jnp.int32)
        for plane in range(4):
            q = plt.load(q_ref.at[plane, row, whole], mask=whole < depth, other=0)
            total = _dp4a(ones, q, total)
        offsets.append(jnp.sum(total))
    valid = outputs < width
    if scale_ref.shape[0] == 1:
        scale = scale_ref[0]
    else:
        scale = plt.load(scale_ref.at[outputs], mask=valid, other=0.0)
    for row in range(rows):
        sums = jnp.sum(totals[row], axis=1) - offsets[row]
        value = sums.astype(jnp.float32) * (row_ref[row, 0] * scale)
        plt.store(out_ref.at[row, outputs], value, mask=valid)


def _plane(codes: Array, i: int) -> Array:
    """The i-th codes, 0 to 2, of bytes [...]: int8."""
    if _interpreted():
        return code(codes, i).astype(jnp.int8)
    return _on_words(
        f"shr.u32 $0, $1, {2 * i}; and.b32 $0, $0, 0x03030303;", codes, jnp.int8
    )


def _weights(codes: Array, i: int) -> Array:
    """The i-th weights of bytes [...], int8."""
    if _interpreted():
        return code(codes, i).astype(jnp.int8) - jnp.int8(1)
    # With the highest bit set, none of the four subtractions borrows of the next.
    return _on_words(
        f"shr.u32 $0, $1, {2 * i}; and.b32 $0, $0, 0x03030303;"
        "or.b32 $0, $0, 0x80808080; sub.u32 $0, $0, 0x01010101;"
        "xor.b32 $0, $0, 0x80808080;",
        codes,
        jnp.int8,
    )


def _on_words(assembly: str, x: Array, dtype: Any) -> Array:
    """Of every four neighbors of ``x``, in bytes, four others."""
    (y,) = plt.elementwise_inline_asm(
        assembly,
        args=[x],
        constraints="=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, dtype)],
    )
    return y


def _dp4a(codes: Array, q: Array, total: Array) -> Array:
    """``total`` and the products of codes and ``q``, both int8 of one shape.

    A sum of four neighbors goes to the first of them.
    """
    if _interpreted():
        return total + codes.astype(jnp.int32) * q.astype(jnp.int32)
    (total,) = plt.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $4, $5, $6;"
        "mov.b32 $1, $7; mov.b32 $2, $8; mov.b32 $3, $9;",
        args=[codes, q, total],
        constraints="=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
    )
    return total


# -- Many rows ----------------------------------------------------------------------


def _matrix(q: Array, bound: Array, kernel: PackedTernary) -> Array:
    _, rows, depth = q.shape
    width = kernel.shape[1]
    tiles = matrix_tiles(rows, depth, width)
    steps = -(-depth // (tiles.splits * tiles.depth))
    grid = (-(-width // tiles.outputs), -(-rows // tiles.rows), tiles.splits)
    sums = pl.pallas_call(
        functools.partial(_matrix_kernel, steps=steps, tiles=tiles),
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((tiles.splits, rows, width), jnp.int32),
        compiler_params=plt.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=_interpreted(),
        name="ternary_matrix",
    )(q, kernel.codes)
    total = jnp.sum(sums, axis=0) if tiles.splits > 1 else sums[0]
    row, scale = _factors(bound, kernel)
    return total.astype(jnp.float32) * (row * scale[None, :])


def _matrix_kernel(
    q_ref: Any, codes_ref: Any, out_ref: Any, *, steps: int, tiles: MatrixTiles
) -> None:
    """One tile of the output, of one part of K."""
    _, height, width = out_ref.shape
    depth = codes_ref.shape[1]
    outputs = pl.program_id(0) * tiles.outputs + jnp.arange(
        tiles.outputs, dtype=jnp.int32
    )
    rows = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
    split = pl.program_id(2)
    there = (rows < height)[:, None]

    def step(index: Array, total: Array) -> Array:
        columns = (split * steps + index) * tiles.depth + jnp.arange(
            tiles.depth, dtype=jnp.int32
        )
        inside = (columns < depth)[None, :]
        codes = plt.load(
            codes_ref.at[outputs[:, None], columns[None, :]], mask=inside, other=0
        )
        for plane in range(4):
            q = plt.load(
                q_ref.at[plane, rows[:, None], columns[None, :]],
                mask=there & inside,
                other=0,
            )
            total += jax.lax.dot_general(
                _weights(codes, plane),
                q,
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32,
            )
        return total

    zero = jnp.zeros((tiles.outputs, tiles.rows), jnp.int32)
    total = jax.lax.fori_loop(0, steps, step, zero)
    plt.store(
        out_ref.at[split, rows[:, None], outputs[None, :]],
        total.T,
        mask=there & (outputs < width)[None, :],
    )
