"""How the next token is drawn."""

import dataclasses

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is drawn; filters apply in the order given here.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: keep the k likeliest; 0 keeps all.
      top_p: keep the smallest set whose probability reaches p; 1 keeps all.
      min_p: keep tokens at least this probable relative to the likeliest; 0 keeps all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise VaaniError("temperature and top-k must be at least 0")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise VaaniError("top-p must be in (0, 1] and min-p in [0, 1]")


def sample_token(
    logits: Array, key: Array, sampler: SamplerConfig, num_samples: int | None = None
) -> Array:
    """Draws ids [B], int32, from logits [B, V] (float32).

    Rows are independent; with ``num_samples``, a divisor of B, those of each run of
    this many rows are, and all runs share their random numbers: a row draws the same
    whatever other runs there are.
    """
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampler.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.sum(before < sampler.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(
            logits >= jnp.take_along_axis(ordered, last, axis=-1), logits, -jnp.inf
        )
    if sampler.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampler.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    # Adding Gumbel noise and taking the largest draws from the softmax.
    noise = jax.random.gumbel(key, (num_samples or len(logits), logits.shape[-1]))
    noise = jnp.tile(noise, (len(logits) // len(noise), 1))
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
