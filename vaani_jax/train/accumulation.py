"""Gradients of a batch that is cut into micro-batches, one after the other.

Each device adds up the gradients of its own rows over all micro-batches, and devices
exchange the sums: once a step, where one gradient of a micro-batch after the other
would take as many times the bytes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.devices.apart import each_apart, zeros_apart
from vaani_jax.devices.mesh import BATCH, Exchange, constrain, shards

Array = jax.Array
Tree = Any


# Of params, quant, tokens [B, T + 1] and a key: ((mean loss, quant), gradients).
Compute = Callable[[Tree, Tree, Array, Array], tuple[tuple[Array, Tree], Tree]]


def accumulated(
    compute: Compute,
    params: Tree,
    quant: Tree,
    tokens: Array,
    key: Array,
    *,
    micro_batches: int,
    exchange: Exchange,
) -> tuple[Array, Tree, Tree]:
    """Loss, ``quant`` and gradients of a batch.

    Args:
      compute: of a micro-batch.
      params: float32.
      quant: goes from one micro-batch to the next.
      tokens: [B, T + 1].
      key: from which each micro-batch gets its own.
      micro_batches: how many; a divisor of B.
      exchange: when gradients cross ``fsdp``, see `MeshConfig`.
    """
    length = tokens.shape[-1]
    parts = constrain(tokens.reshape(micro_batches, -1, length), None, BATCH, None)
    grads = jax.tree.map(jnp.zeros_like, params)
    axes, rest = (BATCH, None) if exchange == "step" else (("data",), "fsdp")
    devices = shards(axes)
    if devices > 1:
        parts = parts.reshape(micro_batches, devices, -1, length)
        parts = constrain(parts, None, axes, rest, None)
        grads = zeros_apart(params, axes, devices)
        compute = each_apart(compute, axes, (None, None, 0, None), ((0, None), 0))

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        index, part = xs
        total, quant, grads = carry
        (loss, quant), more = compute(
            params, quant, part, jax.random.fold_in(key, index)
        )
        if devices > 1:
            loss = jnp.mean(loss)
        return (total + loss, quant, jax.tree.map(jnp.add, grads, more)), None

    (loss, quant, grads), _ = jax.lax.scan(
        body, (jnp.zeros(()), quant, grads), (jnp.arange(micro_batches), parts)
    )
    if devices > 1:
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    mean = lambda x: x / micro_batches  # noqa: E731
    return mean(loss), quant, jax.tree.map(mean, grads)
