"""Products with packed weights in plain JAX, which every backend is compared with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vaani_jax.quant.packed import PackedTernary, scale_of, unpack
from vaani_jax.quant.product import integers_of, scaled_product
from vaani_jax.quant.spec import operand_dtype

Array = jax.Array


def reference(
    x: Array,
    packed: Sequence[PackedTernary],
    activation_range: Array | None,
    activation_group: int = 0,
) -> list[Array]:
    """`ternary_matmul` in plain JAX: x [M, K] float32, outputs [M, N] float32."""
    q, _, bound = integers_of(x, activation_group, activation_range)
    dtype = operand_dtype("auto")
    return [
        scaled_product(
            q.astype(dtype),
            unpack(kernel, dtype),
            scale_of(kernel),
            bound,
            x.shape,
            jnp.float32,
            grouped=activation_group > 0,
        )
        for kernel in packed
    ]
