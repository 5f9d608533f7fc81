"""The straight-through estimator alone: one value forward, another gradient back."""

import jax
import jax.numpy as jnp

Array = jax.Array


def straight_through(value: Array, surrogate: Array) -> Array:
    """``value`` forward; in the backward pass the gradient goes to ``surrogate``."""
    return _straight_through(surrogate, jax.lax.stop_gradient(value))


@jax.custom_vjp
def _straight_through(surrogate: Array, value: Array) -> Array:
    return value.astype(surrogate.dtype)


def _straight_through_fwd(surrogate: Array, value: Array) -> tuple[Array, Array]:
    return value.astype(surrogate.dtype), value


def _straight_through_bwd(value: Array, g: Array) -> tuple[Array, Array]:
    return g, jnp.zeros_like(value)


_straight_through.defvjp(_straight_through_fwd, _straight_through_bwd)
