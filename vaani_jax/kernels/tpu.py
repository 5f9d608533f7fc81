"""Products with packed weights on TPUs: Pallas, through Mosaic.

The kernel takes the codes in planes (`quant/packed.py`): with activations
``q [M, 4 Q]`` cut in four, ``q_i [M, Q]``, and the i-th pair of bits of every byte,
``c_i [Q, N]``,

    q @ T  =  sum_i  q_i @ (c_i - 1)

where every product is of int8 with an int32 sum: exact, and what matrix units are
fastest at (v5e and later multiply int8 twice as fast as bfloat16; before them, Mosaic
has no product of int8 and says so). Two bits a weight is what crosses the memory bus.

Blocks follow the Pallas TPU guide: their last dimension is a multiple of 128, and the
one before it of 32, a tile of 8-bit numbers; programs along K run in order and add up
in the block of the result, which stays in vector memory meanwhile.

Elsewhere than on a TPU the kernel runs in Pallas's interpreter, which is how the tests
compare it with the reference on a CPU.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vaani_jax.quant.activations import integers
from vaani_jax.quant.packed import PackedTernary, code, relayout
from vaani_jax.quant.product import output_scale

Array = jax.Array

DEPTH = 128  # bytes of codes along K at a time: 512 weights
WIDTH = 128  # outputs of a program
HEIGHTS = 32, 128  # rows of a program, at most: few, many


def ternary_matmul(
    x: Array, packed: Sequence[PackedTernary], activation_range: Array | None
) -> list[Array]:
    """See `vaani_jax.kernels.ternary_matmul`: x [M, K] float32, [M, N] float32 each."""
    q, bound = integers(x, activation_range)
    q = q.astype(jnp.int8)
    outputs = []
    for kernel in packed:
        kernel = relayout(kernel, "planes")
        sums = _integer_product(q, kernel.codes)[:, : kernel.shape[1]]
        outputs.append(sums.astype(jnp.float32) * output_scale(bound, kernel.scale, 2))
    return outputs


def _integer_product(q: Array, codes: Array) -> Array:
    """``q @ T``: q [M, K] int8, codes [Q, N] uint8 -> [M, N] int32."""
    rows, depth = q.shape
    few, many = HEIGHTS
    height = few if rows <= few else many
    padded = -(-rows // height) * height
    quarter, width = codes.shape
    q = jnp.pad(q, ((0, padded - rows), (0, 4 * quarter - depth)))
    quarters = q.reshape(padded, 4, quarter).transpose(1, 0, 2)
    product = pl.pallas_call(
        _kernel,
        grid=(padded // height, width // WIDTH, quarter // DEPTH),
        in_specs=[
            pl.BlockSpec((4, height, DEPTH), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((DEPTH, WIDTH), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((height, WIDTH), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded, width), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=jax.default_backend() != "tpu",
    )
    return product(quarters, codes)[:rows]


def _kernel(q_ref: Any, codes_ref: Any, out_ref: Any) -> None:
    """One tile of the output and of K; programs run in order and add up."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    codes = codes_ref[...].astype(jnp.int32)
    for plane in range(4):
        weights = (code(codes, plane) - 1).astype(jnp.int8)
        out_ref[...] += jax.lax.dot_general(
            q_ref[plane],
            weights,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
