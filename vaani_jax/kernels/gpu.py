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

Before them, `_quantize_kernel` makes integers of activations, a program a row, after an
RMSNorm if there is one. All sums of products are of integers, so any order gives the
same bits; the norm's are of floats, in an order that does not depend on other rows.

Elsewhere than on a GPU the kernels run in Pallas's interpreter, which is how the tests
compare them with the reference on a CPU.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from vaani_jax.kernels.tiles import MatrixTiles, VectorTiles, matrix_tiles, vector_tiles
from vaani_jax.quant.activations import LOWEST
from vaani_jax.quant.barriers import rounded, to_dtype
from vaani_jax.quant.packed import PackedTernary, code, relayout
from vaani_jax.quant.product import output_scale
from vaani_jax.quant.rounding import EPSILON, LARGEST

Array = jax.Array

FEW_ROWS = 8  # up to which a product is one of vectors


Norm = tuple[Array, float]


def ternary_matmul(
    x: Array,
    packed: Sequence[PackedTernary],
    activation_range: Array | None,
    norm: Norm | None = None,
) -> list[Array]:
    """See `vaani_jax.kernels.ternary_matmul`: x [M, K], [M, N] in its dtype each."""
    kernels = [relayout(kernel, "rows") for kernel in packed]
    q, bound = _quantized(x, activation_range, norm, kernels[0].codes.shape[1])
    if x.shape[0] <= FEW_ROWS:
        return _vectors(q, bound, kernels, x.dtype)
    return [_matrix(q, bound, kernel, x.dtype) for kernel in kernels]


def interpreted() -> bool:
    return jax.default_backend() != "gpu"


def _factor(bound: Array, scale: Array, per_tensor: bool) -> Array:
    """`quant.product.output_scale` of a row: a bound [] and scales [] or [n]."""
    part = 1.0 / LARGEST
    return bound * (scale * part) if per_tensor else (bound * part) * scale


# -- Activations ----------------------------------------------------------------------


def _quantized(
    x: Array, activation_range: Array | None, norm: Norm | None, depth: int
) -> tuple[Array, Array]:
    """Quantizes rows, after an RMSNorm if there is one: a program a row.

    Args:
      x: [M, K], float32 or bfloat16.
      activation_range: see `quantize_activations`.
      norm: scale [K] and epsilon.
      depth: bytes of codes of an output.

    Returns:
      int8 [4, M, depth], what meets the i-th plane of each byte; and what 127 stands
      for, [M] float32, NaN where a row is not finite.
    """
    rows = x.shape[0]
    arguments = [x]
    if activation_range is not None:
        arguments.append(activation_range.reshape(1))
    if norm is not None:
        arguments.append(norm[0])
    wide = pl.next_power_of_2(depth)
    q, bound = pl.pallas_call(
        functools.partial(
            _quantize_kernel,
            tracked=activation_range is not None,
            epsilon=None if norm is None else norm[1],
        ),
        grid=(rows,),
        out_shape=[
            jax.ShapeDtypeStruct((4, rows, depth), jnp.int8),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(
            num_warps=max(1, min(8, wide // 64)), num_stages=1
        ),
        interpret=interpreted(),
        name=f"quantize_{x.shape[1]}",
    )(*arguments)
    return q, bound


def _quantize_kernel(
    x_ref: Any, *refs: Any, tracked: bool, epsilon: float | None
) -> None:
    inputs, (q_ref, bound_ref) = iter(refs[:-2]), refs[-2:]
    limit_ref = next(inputs) if tracked else None
    scale_ref = next(inputs) if epsilon is not None else None
    row, width, depth = pl.program_id(0), x_ref.shape[1], q_ref.shape[2]
    # Four neighbors a thread.
    word = jnp.arange(pl.next_power_of_2(depth // 4), dtype=jnp.int32)[:, None]
    byte = jnp.arange(4, dtype=jnp.int32)[None, :]
    column = 4 * word + byte
    places = [16 * word + 4 * plane + byte for plane in range(4)]
    parts = [
        plt.load(x_ref.at[row, at], mask=at < width, other=0.0).astype(jnp.float32)
        for at in places
    ]
    if scale_ref is not None and epsilon is not None:
        squares = sum((jnp.sum(part * part) for part in parts), jnp.float32(0))
        inverse = jax.lax.rsqrt(squares * (1.0 / width) + epsilon)
        for i, at in enumerate(places):
            scale = plt.load(scale_ref.at[at], mask=at < width, other=0.0)
            normal = parts[i] * inverse * scale
            parts[i] = normal.astype(x_ref.dtype).astype(jnp.float32)
    # Bits of floats that aren't negative are in their order, with NaN above all.
    bits = [
        jnp.max(jax.lax.bitcast_convert_type(jnp.abs(part), jnp.int32))
        for part in parts
    ]
    largest = functools.reduce(jnp.maximum, bits)
    infinite = np.float32(np.inf).view(np.int32)
    if limit_ref is None:
        bound = jax.lax.bitcast_convert_type(largest, jnp.float32)
    else:
        bound = limit_ref[0]
    bound = jnp.maximum(bound, EPSILON)
    # Triton and XLA divide alike on a GPU, though not as IEEE 754 has it: 2 ulp.
    factor = LARGEST / bound
    for plane, part in enumerate(parts):
        codes = jnp.clip(_nearest_product(part, factor), LOWEST, LARGEST)
        plt.store(
            q_ref.at[plane, row, column],
            codes.astype(jnp.int32).astype(jnp.int8),
            mask=column < depth,
        )
    bound_ref[row] = jnp.where(largest < infinite, bound, jnp.nan)


def rounded_product(x: Array, y: Array) -> Array:
    """``x y``, rounded before anything is added to it."""
    y = jnp.broadcast_to(y, x.shape)
    return (
        rounded(x * y) if interpreted() else _on_floats("mul.rn.f32 $0, $1, $2;", x, y)
    )


def _nearest_product(x: Array, y: Array) -> Array:
    """``round(x y)``, half to even, where the product is rounded before."""
    y = jnp.broadcast_to(y, x.shape)
    if interpreted():
        return jnp.round(x * y)
    return _on_floats("mul.rn.f32 $0, $1, $2; cvt.rni.f32.f32 $0, $0;", x, y)


def _on_floats(assembly: str, x: Array, y: Array) -> Array:
    (z,) = plt.elementwise_inline_asm(
        assembly,
        args=[x, y],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return z


# -- Few rows -----------------------------------------------------------------------


def _vectors(
    q: Array, bound: Array, kernels: Sequence[PackedTernary], dtype: Any
) -> list[Array]:
    _, rows, depth = q.shape
    tiles = vector_tiles(rows, depth, sum(kernel.shape[1] for kernel in kernels))
    # A program is of one kernel: those of the second follow those of the first.
    starts, end = [], 0
    for kernel in kernels:
        starts.append(end)
        end += -(-kernel.shape[1] // tiles.outputs)
    arguments: list[Array] = [q, bound]
    for kernel in kernels:
        arguments += [kernel.codes, kernel.scale.reshape(-1)]
    call = pl.pallas_call(
        functools.partial(_vector_kernel, starts=starts, tiles=tiles),
        grid=(end,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, kernel.shape[1]), dtype) for kernel in kernels
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpreted(),
        name=f"ternary_vectors_{4 * depth}_{sum(k.shape[1] for k in kernels)}",
    )
    return list(call(*arguments))


def _vector_kernel(
    q_ref: Any,
    bound_ref: Any,
    *refs: Any,
    starts: Sequence[int],
    tiles: VectorTiles,
) -> None:
    """Some outputs of one of the kernels, for all rows."""
    program = pl.program_id(0)
    inputs, outputs = refs[: 2 * len(starts)], refs[2 * len(starts) :]
    for i, (start, out_ref) in enumerate(zip(starts, outputs, strict=True)):
        mine = program >= start
        if i + 1 < len(starts):
            mine &= program < starts[i + 1]
        run = functools.partial(
            _vector_tile,
            q_ref,
            bound_ref,
            inputs[2 * i],
            inputs[2 * i + 1],
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
    bound_ref: Any,
    codes_ref: Any,
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
    scale, per_tensor = _scale(scale_ref, outputs, valid)
    for row in range(rows):
        sums = jnp.sum(totals[row], axis=1) - offsets[row]
        value = sums.astype(jnp.float32) * _factor(bound_ref[row], scale, per_tensor)
        plt.store(out_ref.at[row, outputs], value.astype(out_ref.dtype), mask=valid)


def _scale(scale_ref: Any, outputs: Array, valid: Array) -> tuple[Array, bool]:
    """Of some outputs: [] and True where a kernel has one scale, else [n]."""
    if scale_ref.shape[0] == 1:
        return scale_ref[0], True
    return plt.load(scale_ref.at[outputs], mask=valid, other=0.0), False


def _plane(codes: Array, i: int) -> Array:
    """The i-th codes, 0 to 2, of bytes [...]: int8."""
    if interpreted():
        return code(codes, i).astype(jnp.int8)
    return _on_words(
        f"shr.u32 $0, $1, {2 * i}; and.b32 $0, $0, 0x03030303;", codes, jnp.int8
    )


def _weights(codes: Array, i: int) -> Array:
    """The i-th weights of bytes [...], int8."""
    if interpreted():
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
    if interpreted():
        return total + codes.astype(jnp.int32) * q.astype(jnp.int32)
    (total,) = plt.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $4, $5, $6;mov.b32 $1, $7; mov.b32 $2, $8; mov.b32 $3, $9;",
        args=[codes, q, total],
        constraints="=&r,=&r,=&r,=&r,r,r,r,r,r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
    )
    return total


# -- Many rows ----------------------------------------------------------------------


def _matrix(q: Array, bound: Array, kernel: PackedTernary, dtype: Any) -> Array:
    _, rows, depth = q.shape
    width = kernel.shape[1]
    tiles = matrix_tiles(rows, depth, width)
    steps = -(-depth // (tiles.splits * tiles.depth))
    whole = tiles.splits == 1
    out = pl.pallas_call(
        functools.partial(_matrix_kernel, steps=steps, tiles=tiles),
        grid=(-(-width // tiles.outputs), -(-rows // tiles.rows), tiles.splits),
        out_shape=jax.ShapeDtypeStruct(
            (tiles.splits, rows, width), dtype if whole else jnp.int32
        ),
        compiler_params=plt.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpreted(),
        name=f"ternary_matrix_{4 * depth}_{width}",
    )(q, bound, kernel.codes, kernel.scale.reshape(-1))
    if whole:
        return out[0]
    sums = jnp.sum(out, axis=0).astype(jnp.float32)
    return to_dtype(sums * output_scale(bound[:, None], kernel.scale, 2), dtype)


def _matrix_kernel(
    q_ref: Any,
    bound_ref: Any,
    codes_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    *,
    steps: int,
    tiles: MatrixTiles,
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
    value = jax.lax.fori_loop(0, steps, step, zero).T
    valid = outputs < width
    if tiles.splits == 1:
        scale, per_tensor = _scale(scale_ref, outputs, valid)
        bound = plt.load(bound_ref.at[rows], mask=rows < height, other=0.0)
        scale = scale if per_tensor else scale[None, :]
        value = value.astype(jnp.float32) * _factor(bound[:, None], scale, per_tensor)
    plt.store(
        out_ref.at[split, rows[:, None], outputs[None, :]],
        value.astype(out_ref.dtype),
        mask=there & valid[None, :],
    )
