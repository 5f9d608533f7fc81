"""Rows of a batch kept apart by device, so that gradients cross devices once a step.

A step sums the gradients of its micro-batches, and each of those is a sum over devices:
``dW = sum_i sum_d dW_id``. Written as for one device, the inner sum belongs to a
product, and XLA sends it in every micro-batch. Here it changes places with the outer
one: `each_apart` maps a micro-batch over devices, so that every gradient has a leading
axis [devices], cut such that each device holds its own; who calls it adds them up over
micro-batches, and sums that axis at the end.

What is mapped is written for the rows of a batch, and does not know that it gets some
of them, with three exceptions: `mesh.constrain` leaves out the axes that are mapped,
and `largest` and `draw` are of all rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Array = jax.Array
Tree = Any


_ROWS = "rows"  # the mapped axis


# The mapped axes of the mesh; part of what JAX looks a traced function up by.
_axes = jax.make_user_context(())


def mapped_axes() -> tuple[str, ...]:
    """The axes of the mesh along which what is traced now has its rows apart."""
    axes: tuple[str, ...] = _axes.value
    return axes


def each_apart(
    function: Callable[..., Any], axes: tuple[str, ...], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """`jax.vmap` over the devices along ``axes``, each of which computes its own.

    Args:
      function: of rows of a batch, and of what is the same for all.
      axes: of the mesh, which must be set.
      in_axes, out_axes: as of `jax.vmap`; a mapped axis has as many entries as there
        are devices along ``axes``.
    """
    over_devices = jax.vmap(
        function, in_axes, out_axes, axis_name=_ROWS, spmd_axis_name=axes
    )

    def call(*arguments: Any) -> Any:
        with _axes(axes):
            return over_devices(*arguments)

    return call


def zeros_apart(like: Tree, axes: tuple[str, ...], devices: int) -> Tree:
    """Zeros [devices, ...] for every array, where each device adds up its own."""

    def zeros(leaf: Array) -> Array:
        free = (PartitionSpec.UNCONSTRAINED,) * leaf.ndim
        made = jnp.zeros((devices, *leaf.shape), leaf.dtype)
        return jax.lax.with_sharding_constraint(made, PartitionSpec(axes, *free))

    return jax.tree.map(zeros, like)


def largest(x: Array) -> Array:
    """The largest magnitude in ``x``, a scalar; of all rows where they are apart."""
    here = jax.lax.stop_gradient(jnp.max(jnp.abs(x)).astype(jnp.float32))
    return jax.lax.pmax(here, _ROWS) if mapped_axes() else here


def draw(sample: Callable[..., Array], key: Array, shape: Sequence[int]) -> Array:
    """``sample(key, shape=shape)``; this device's part of it where rows are apart.

    So every mesh draws the same. The first dimension of ``shape`` is that of the rows.
    """
    if not mapped_axes():
        return sample(key, shape=tuple(shape))

    @jax.custom_batching.custom_vmap
    def drawn(key: Array, device: Array) -> Array:
        del device  # is there to be mapped
        return sample(key, shape=tuple(shape))

    @drawn.def_vmap
    def _(devices: int, batched: Any, key: Array, device: Array) -> tuple[Array, bool]:
        del batched, device
        return sample(key, shape=(devices, *shape)), True

    return drawn(key, jax.lax.axis_index(_ROWS))
