"""Losses of training."""

import jax
import optax

Array = jax.Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean negative log-likelihood in nats: logits [..., V], targets [...]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return losses.mean()
