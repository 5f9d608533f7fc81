"""Products with packed weights on GPUs and TPUs, in Pallas.

Both kernels take the codes in planes (`pack.py`): with activations ``q [M, 4 Q]`` cut
in four, ``q_i [M, Q]``, and the i-th pair of bits of every byte, ``c_i [Q, N]``,

    q @ T  =  sum_i  q_i @ (c_i - 1)

where every product is of int8 with an int32 sum: exact, and what the matrix units of
both kinds of chip are fastest at. Two bits a weight is what crosses the memory bus.

On another platform than their own the kernels run in Pallas's interpreter, which is how
the tests compare them with the reference on a CPU.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from vaani_jax.quant.activations import activation_bound, quantize_activations
from vaani_jax.quant.packed import PackedTernary, code, relayout
from vaani_jax.quant.product import output_scale

Array = jax.Array


Platform = Literal["gpu", "tpu"]


DEPTH = 64  # bytes of codes along K at a time: 256 weights


WIDTH = 128  # outputs of a program


def ternary_matmul(
    x: Array,
    packed: Sequence[PackedTernary],
    activation_range: Array | None,
    *,
    platform: Platform,
) -> list[Array]:
    """See `vaani_jax.kernels.ternary_matmul`: x [M, K] float32, [M, N] float32 each."""
    bound = activation_bound(x, activation_range)
    q = quantize_activations(x, bound)[0].astype(jnp.int8)
    outputs = []
    for kernel in packed:
        kernel = relayout(kernel, "planes")
        sums = _integer_product(q, kernel.codes, platform)[:, : kernel.shape[1]]
        outputs.append(sums.astype(jnp.float32) * output_scale(bound, kernel.scale, 2))
    return outputs


def _integer_product(q: Array, codes: Array, platform: Platform) -> Array:
    """``q @ T``: q [M, K] int8, codes [Q, N] uint8 -> [M, N] int32."""
    rows, depth = q.shape
    height = _block_rows(rows)
    padded = -(-rows // height) * height
    quarter, width = codes.shape
    q = jnp.pad(q, ((0, padded - rows), (0, 4 * quarter - depth)))
    quarters = q.reshape(padded, 4, quarter).transpose(1, 0, 2)
    shape = jax.ShapeDtypeStruct((padded, width), jnp.int32)
    interpret = jax.default_backend() != platform
    tiles = (padded // height, width // WIDTH)
    if platform == "gpu":
        product = pl.pallas_call(
            _gpu_kernel,
            grid=tiles,
            in_specs=[
                pl.BlockSpec((4, height, quarter), lambda i, j: (0, i, 0)),
                pl.BlockSpec((quarter, WIDTH), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((height, WIDTH), lambda i, j: (i, j)),
            out_shape=shape,
            interpret=interpret,
        )
    else:
        product = pl.pallas_call(
            _tpu_kernel,
            grid=(*tiles, quarter // DEPTH),
            in_specs=[
                pl.BlockSpec((4, height, DEPTH), lambda i, j, k: (0, i, k)),
                pl.BlockSpec((DEPTH, WIDTH), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((height, WIDTH), lambda i, j, k: (i, j)),
            out_shape=shape,
            interpret=interpret,
        )
    return product(quarters, codes)[:rows]


def _block_rows(rows: int) -> int:
    """Rows of a program: at least what a matrix unit takes."""
    return 32 if rows <= 32 else 128


def _weights(codes: Array, plane: int) -> Array:
    """int8 weights of a plane of codes."""
    return (code(codes.astype(jnp.int32), plane) - 1).astype(jnp.int8)


def _dot(a: Array, b: Array) -> Array:
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )


def _gpu_kernel(q_ref: Any, codes_ref: Any, out_ref: Any) -> None:
    """One tile of the output; programs run side by side, so the loop is inside."""
    steps = codes_ref.shape[0] // DEPTH

    def step(index: Array, total: Array) -> Array:
        at = pl.ds(index * DEPTH, DEPTH)
        codes = codes_ref[at, :]
        for plane in range(4):
            total += _dot(q_ref[plane, :, at], _weights(codes, plane))
        return total

    zero = jnp.zeros(out_ref.shape, jnp.int32)
    out_ref[...] = jax.lax.fori_loop(0, steps, step, zero)


def _tpu_kernel(q_ref: Any, codes_ref: Any, out_ref: Any) -> None:
    """One tile of the output and of K; programs run in order and add up."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    codes = codes_ref[...]
    for plane in range(4):
        out_ref[...] += _dot(q_ref[plane], _weights(codes, plane))
