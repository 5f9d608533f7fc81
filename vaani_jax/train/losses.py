"""Losses of training."""

import jax

from vaani_jax.kernels.floats import log_likelihood

Array = jax.Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean negative log-likelihood in nats: logits [..., V], targets [...]."""
    return -log_likelihood(logits, targets).mean()
