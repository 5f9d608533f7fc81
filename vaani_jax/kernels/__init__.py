"""Products with packed weights: one function, several ways to compute it.

    ternary_matmul(x, packed)     quantizes x, multiplies, rescales
    rows_matmul(x, rows)          an output head in 8 bits

Backends, all equal to the bit in `ternary_matmul`:

* "reference": plain JAX, on any platform;
* "cpu": native code through `jax.ffi` (`cpu/kernels.cc`), built with the package;
* "gpu", "tpu": Pallas (`gpu.py`, `tpu.py`).

The backend is chosen once, by the platform, and told once; ``VAANI_KERNELS`` in the
environment forces one, and it is an error if that one is missing.
"""

from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.kernels import cpu
from vaani_jax.kernels.choice import BACKENDS as BACKENDS
from vaani_jax.kernels.choice import Backend, backend
from vaani_jax.kernels.choice import layout as layout
from vaani_jax.kernels.floats import rms_norm
from vaani_jax.kernels.reference import reference
from vaani_jax.quant.barriers import to_dtype
from vaani_jax.quant.packed import PackedRows, PackedTernary

Array = jax.Array


Norm = tuple[Array, float]


FEW_ROWS = 4  # up to which a norm joins its product in one call on a CPU


@overload
def ternary_matmul(
    x: Array,
    packed: PackedTernary,
    *,
    activation_range: Array | None = None,
    activation_group: int = 0,
    norm: Norm | None = None,
    using: Backend | None = None,
) -> Array: ...


@overload
def ternary_matmul(
    x: Array,
    packed: Sequence[PackedTernary],
    *,
    activation_range: Array | None = None,
    activation_group: int = 0,
    norm: Norm | None = None,
    using: Backend | None = None,
) -> tuple[Array, ...]: ...


def ternary_matmul(
    x: Array,
    packed: PackedTernary | Sequence[PackedTernary],
    *,
    activation_range: Array | None = None,
    activation_group: int = 0,
    norm: Norm | None = None,
    using: Backend | None = None,
) -> Any:
    """Products of one input, quantized to 8 bits, with packed kernels.

    Equal to `quant.ternary_dot` of the kernels that were packed, bit for bit in
    float32. Not differentiable.

    Args:
      x: activations [..., K], float32 or bfloat16.
      packed: a kernel [K, N], or several that share the input.
      activation_range: see `quantize_activations`.
      activation_group: inputs of x with a scale of their own; 0 for one per token.
      norm: scale [K] and epsilon of an RMSNorm that x passes first.
      using: the backend; None takes `backend()`.

    Returns:
      [..., N] in ``x.dtype``; a tuple of them for several kernels.
    """
    if isinstance(packed, PackedTernary):
        (y,) = ternary_matmul(
            x,
            (packed,),
            activation_range=activation_range,
            activation_group=activation_group,
            norm=norm,
            using=using,
        )
        return y
    for kernel in packed:
        if kernel.shape[0] != x.shape[-1]:
            raise VaaniError(
                f"activations of width {x.shape[-1]} do not fit a packed kernel of"
                f" {kernel.shape[0]} inputs"
            )
    name = using or backend()
    grouped = activation_group or any(kernel.groups for kernel in packed)
    if grouped and name in ("gpu", "tpu"):
        name = "reference"  # Pallas kernels have a scale per tensor or channel
    flat = x.reshape(-1, x.shape[-1])
    if norm is not None and not _joins(name, len(flat)):
        flat, norm = rms_norm(flat, *norm), None
    kernels = tuple(packed)
    outputs: Sequence[Array]
    if name == "gpu":
        from vaani_jax.kernels import gpu

        outputs = gpu.ternary_matmul(flat, kernels, activation_range, norm)
    elif name == "cpu":
        halves = x.dtype == jnp.bfloat16
        outputs = cpu.ternary_matmul(
            flat.astype(jnp.float32),
            kernels,
            activation_range,
            norm,
            halves=halves,
            activation_group=activation_group,
        )
    elif name == "reference":
        wide = flat.astype(jnp.float32)
        outputs = reference(wide, kernels, activation_range, activation_group)
    else:
        from vaani_jax.kernels import tpu

        wide = flat.astype(jnp.float32)
        outputs = tpu.ternary_matmul(wide, kernels, activation_range)
    return tuple(
        to_dtype(y.reshape(*x.shape[:-1], y.shape[-1]), x.dtype) for y in outputs
    )


def _joins(name: Backend, rows: int) -> bool:
    """Whether a norm joins its product in one call.

    In native code for a few rows, as when decoding: there the calls around a product
    cost more than the product. On a GPU always, where quantization passes the rows.
    """
    return name == "gpu" or (name == "cpu" and rows <= FEW_ROWS)


def rows_matmul(x: Array, rows: PackedRows, *, using: Backend | None = None) -> Array:
    """``x @ dequantized(rows).T`` for x [..., D]: [..., V] in float32.

    Activations take part in 16 bits, with a scale per token: coarser rounding than
    float32's, and far finer than that of the rows. Backends agree to float rounding.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if (using or backend()) == "cpu":
        y = cpu.rows_matmul(flat, rows)
    elif (using or backend()) == "gpu":
        y = _split_matmul(flat, rows.codes) * rows.scale[None, :]
    else:
        codes = rows.codes.astype(jnp.float32)
        y = jnp.dot(flat, codes.T, precision="highest") * rows.scale[None, :]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _split_matmul(x: Array, codes: Array) -> Array:
    """``x @ codes.T`` for x [M, D] float32 and codes [V, D] int8: [M, V] float32.

    For matrix units that multiply bfloat16, which holds codes exactly: three parts of
    ``x`` in bfloat16 hold it to 24 bits, and codes are not written out in float32.
    """
    parts = []
    for _ in range(3):
        part = to_dtype(x, jnp.bfloat16)
        parts.append(part)
        x = x - part.astype(jnp.float32)
    y = jnp.einsum(
        "PMD,VD->PMV",
        jnp.stack(parts),
        codes.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return y[0] + (y[1] + y[2])
