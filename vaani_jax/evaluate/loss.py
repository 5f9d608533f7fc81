"""Loss, perplexity and bits per byte over held-out text."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.data.batches import validation_windows
from vaani_jax.data.corpus import Split
from vaani_jax.kernels.floats import log_likelihood
from vaani_jax.model.transformer import Vaani
from vaani_jax.text.tokenizers import Tokenizer

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text.

    Attributes:
      loss: mean negative log-likelihood in nats per token.
      tokens: tokens predicted.
      bytes: length in UTF-8 of what they spell.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) * self.tokens / self.bytes

    def as_dict(self) -> dict[str, float | int]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


class ValidationSet:
    """ALL non-overlapping windows of held-out tokens, in batches of one shape."""

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        parts: int = 1,
    ) -> None:
        """Batches of ``batch_size`` windows or a few more: a multiple of ``parts``."""
        windows = validation_windows(tokens, seq_len)
        targets = windows[:, 1:]
        self.tokens = targets.size
        text = tokenizer.decode(targets.reshape(-1))
        self.bytes = len(text.encode("utf-8"))
        batch_size = -(-min(batch_size, len(windows)) // parts) * parts
        count = -(-len(windows) // batch_size) * batch_size
        weights = np.zeros(count, np.float32)
        weights[: len(windows)] = 1.0
        # Padding repeats real windows and weighs nothing.
        windows = windows[np.arange(count) % len(windows)]
        self.batches = [
            (windows[i : i + batch_size], weights[i : i + batch_size])
            for i in range(0, len(windows), batch_size)
        ]

    def evaluate(
        self,
        eval_step: Callable[..., jax.Array],
        variables: Tree,
        stop: Callable[[], bool] = lambda: False,
        put: Callable[[np.ndarray], jax.Array] = jax.device_put,
    ) -> Evaluation | None:
        """Runs a jitted `make_eval_step` over everything.

        Args:
          eval_step: the jitted function.
          variables: of the model.
          stop: asked between batches; where it says so, the result is None.
          put: places an array with one entry per window on the devices.
        """
        sums = []
        for windows, weights in self.batches:
            if stop():
                return None
            sums.append(eval_step(variables, put(windows), put(weights)))
            if len(sums) > 1:
                sums[-2].block_until_ready()  # bounds the queue, keeps one in flight
        total = sum(float(s) for s in jax.device_get(sums))
        return Evaluation(total / self.tokens, self.tokens, self.bytes)


def validation_set(
    seq_len: int, split: Split, tokenizer: Tokenizer, parts: int = 1
) -> ValidationSet:
    """The held-out windows of a corpus, in batches of about 8192 tokens.

    Batches can be cut into ``parts`` equal ones.
    """
    return ValidationSet(
        split.validation,
        tokenizer,
        seq_len=seq_len,
        batch_size=max(1, 8192 // seq_len),
        parts=parts,
    )


def make_eval_step(
    model: Vaani,
) -> Callable[[Tree, Array, Array], Array]:
    """Builds the evaluation step; jit it.

    Returns:
      A function of variables, tokens [B, T + 1] and weights [B]; it returns the
      summed negative log-likelihood in nats of the rows, times their weights.
    """

    def eval_step(variables: Tree, tokens: Array, weights: Array) -> Array:
        logits = model.apply(variables, tokens[:, :-1])
        losses = -log_likelihood(logits, tokens[:, 1:])
        return jnp.sum(losses.sum(axis=-1) * weights)

    return eval_step
