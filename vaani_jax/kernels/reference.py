"""Products with packed weights: one function, several ways to compute it.

    ternary_matmul(x, packed)     quantizes x per token, multiplies, rescales
    rows_matmul(x, rows)          an output head in 8 bits

Backends, all equal to the bit in `ternary_matmul`:

* "reference": plain JAX, on any platform;
* "cpu": native code through `jax.ffi` (`cpu/kernels.cc`), built with the package;
* "gpu", "tpu": Pallas (`pallas.py`).

The backend is chosen once, by the platform, and told once; ``VAANI_KERNELS`` in the
environment forces one, and it is an error if that one is missing.
"""

import jax
import jax.numpy as jnp

from vaani_jax.quant.activations import activation_bound, quantize_activations
from vaani_jax.quant.packed import PackedTernary, unpack
from vaani_jax.quant.product import output_scale
from vaani_jax.quant.spec import operand_dtype

Array = jax.Array


def reference(
    x: Array, packed: tuple[PackedTernary, ...], activation_range: Array | None
) -> list[Array]:
    """`ternary_matmul` in plain JAX: x [M, K] float32, outputs [M, N] float32."""
    bound = activation_bound(x, activation_range)
    q, _ = quantize_activations(x, bound)
    dtype = operand_dtype("auto")
    outputs = []
    for kernel in packed:
        sums = jnp.dot(
            q.astype(dtype),
            unpack(kernel, dtype),
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        outputs.append(sums * output_scale(bound, kernel.scale, 2))
    return outputs
