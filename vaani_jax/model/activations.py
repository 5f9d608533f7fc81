"""Activations of the gated feed-forward layer.

Each is a function of gate and up projections [..., F], of one dtype, to the hidden
layer [..., F] in that dtype; computed in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.kernels import cpu
from vaani_jax.kernels.floats import native
from vaani_jax.quant.barriers import to_dtype

Array = jax.Array


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up`` (arXiv:2002.05202), with the sigmoid computed once."""
    return _swiglu_fwd(gate, up)[0]


def _swiglu_fwd(gate: Array, up: Array) -> tuple[Array, Any]:
    wide, other = gate.astype(jnp.float32), up.astype(jnp.float32)
    if native():  # sigmoids are approximations, of another kind in each compiler
        rows = (-1, gate.shape[-1])
        y, sigmoid = (
            x.reshape(gate.shape)
            for x in cpu.swiglu(wide.reshape(rows), other.reshape(rows))
        )
    else:
        sigmoid = jax.nn.sigmoid(wide)
        y = wide * sigmoid * other
    return to_dtype(y, gate.dtype), (gate, up, sigmoid.astype(gate.dtype))


def _swiglu_bwd(residuals: Any, g: Array) -> tuple[Array, Array]:
    gate, up, sigmoid = residuals
    return g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def relu2(gate: Array, up: Array) -> Array:
    """``relu(gate)^2 * up``."""
    wide = jax.nn.relu(gate.astype(jnp.float32))
    return to_dtype(jnp.square(wide) * up.astype(jnp.float32), gate.dtype)


# A further activation is a function and a row.
ACTIVATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": swiglu,
    "relu2": relu2,
}
