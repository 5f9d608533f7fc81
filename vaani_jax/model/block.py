"""A transformer block: attention and feed-forward on the residual stream."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vaani_jax.devices.apart import draw
from vaani_jax.devices.mesh import BATCH, constrain
from vaani_jax.model.attention import MultiHeadAttention
from vaani_jax.model.config import Architecture, Execution, Quantization
from vaani_jax.model.feed_forward import FeedForward
from vaani_jax.model.norm import NORMS
from vaani_jax.quant.barriers import rounded, to_dtype

Array = jax.Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout; the identity where ``key`` is None or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    keep = draw(partial(jax.random.bernoulli, p=1.0 - rate), key, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _sum(x: Array, y: Array) -> Array:
    """``x + y``, where ``y`` ends with a product."""
    y = rounded(y.astype(jnp.float32))
    return to_dtype(x.astype(jnp.float32) + y, x.dtype)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    architecture: Architecture
    quantization: Quantization
    execution: Execution

    def setup(self) -> None:
        parts = self.architecture, self.quantization, self.execution
        norm = NORMS[self.architecture.norm]
        self.attn_norm = norm(self.architecture.norm_eps)
        self.attn = MultiHeadAttention(*parts)
        self.ffn_norm = norm(self.architecture.norm_eps)
        self.ffn = FeedForward(*parts)

    def __call__(
        self,
        x: Array,
        cache: tuple[Array, ...] | None,
        dropout_key: Array | None,
        positions: Array,
        rotary: tuple[Any, Any],
        mix: Array | None,
        train: bool,
        start: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Maps [B, T, D] to [B, T, D]; arguments as in `MultiHeadAttention`."""
        rate = self.architecture.dropout
        keys: Any = (
            (None, None) if dropout_key is None else jax.random.split(dropout_key)
        )
        y, cache = self.attn(
            x,
            positions,
            rotary,
            cache,
            norm=self.attn_norm,
            train=train,
            mix=mix,
            start=start,
        )
        x = constrain(_sum(x, dropout(y, rate, keys[0])), BATCH, None, None)
        y = self.ffn(x, norm=self.ffn_norm, train=train, mix=mix)
        x = _sum(x, dropout(y, rate, keys[1]))
        return constrain(x, BATCH, None, None), cache
