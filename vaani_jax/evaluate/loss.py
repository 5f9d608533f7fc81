"""Loss, perplexity and bits per byte over held-out text.

Memory follows settings, not the text: windows are cut out of the tokens when their
batch is due, and no array of logits [B, T, V] is made. States [B, T, D] pass the head a
piece of T at a time, as long as `LOGITS_BYTES` allow; the losses of the pieces are
joined, and summed in the order in which they would be without pieces.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.data.batches import validation_windows
from vaani_jax.data.corpus import Split
from vaani_jax.devices.mesh import BATCH, shards
from vaani_jax.kernels.floats import log_likelihood
from vaani_jax.model.config import Architecture
from vaani_jax.model.transformer import Vaani
from vaani_jax.text.tokenizers import Tokenizer

Array = jax.Array
Tree = Any


# Of one piece of logits on one device. A vocabulary of 4,096 and a batch as below just
# fit, so that small models are evaluated in one piece.
LOGITS_BYTES = 2**27


TOKENS = 8192  # of a batch, about


# Of the scores of attention in one layer, where they are written out. As they grow with
# the square of the context, a batch of long windows has fewer of them.
SCORES_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text.

    Attributes:
      loss: mean negative log-likelihood in nats per token.
      tokens: tokens predicted.
      bytes: length in UTF-8 of the text that they stand for.
      sampled: the loss over the windows that evaluations within a run take, where this
        one took all the others, too; else None.
    """

    loss: float
    tokens: int
    bytes: int
    sampled: float | None = None

    @property
    def comparable(self) -> float:
        """The loss to compare evaluations of one run by: over the same windows."""
        return self.loss if self.sampled is None else self.sampled

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) * self.tokens / self.bytes

    def as_dict(self) -> dict[str, float | int]:
        found = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }
        return (
            found if self.sampled is None else {**found, "sampled_loss": self.sampled}
        )


class ValidationSet:
    """ALL non-overlapping windows of held-out tokens, in batches of one shape.

    Attributes:
      tokens: predicted in all windows.
      bytes: length in UTF-8 of the text that they stand for.
      sampled_tokens: predicted in the windows that evaluations within a run take.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        parts: int = 1,
        limit: int = 0,
        ends: np.ndarray | None = None,
    ) -> None:
        """Batches of ``batch_size`` windows or a few more: a multiple of ``parts``.

        ``ends`` says where in the source each token ends, in bytes, where that can't be
        had from the tokens.

        Of more than ``limit`` windows, this many are the sample, spread evenly over the
        text and always the same; 0 samples all.
        """
        windows = self._windows = validation_windows(tokens, seq_len)
        count = len(windows)
        self.tokens = count * seq_len
        if ends is None:
            targets = tokens[1 : 1 + self.tokens]
            self.bytes = len(tokenizer.decode(targets).encode("utf-8"))
        else:
            # One at least, of a text that is all lost.
            self.bytes = max(1, int(ends[self.tokens] - ends[0]))
        sample = np.arange(count)
        if 0 < limit < count:
            sample = np.arange(limit) * count // limit
        self.sampled_tokens = len(sample) * seq_len
        self._sample = sample
        self._rest = np.setdiff1d(np.arange(count), sample, assume_unique=True)
        self._rows = -(-min(batch_size, len(sample)) // parts) * parts

    @property
    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [B, T + 1] and weights [B] of every batch, those of the sample first.

        Padding repeats real windows and weighs nothing.
        """
        yield from self._batches(self._sample)
        yield from self._batches(self._rest)

    def _batches(self, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(chosen), self._rows):
            places = np.arange(first, first + self._rows)
            weights = (places < len(chosen)).astype(np.float32)
            yield self._windows[chosen[places % len(chosen)]], weights

    def evaluate(
        self,
        eval_step: Callable[..., jax.Array],
        variables: Tree,
        stop: Callable[[], bool] = lambda: False,
        put: Callable[[np.ndarray], jax.Array] = jax.device_put,
        *,
        whole: bool = True,
    ) -> Evaluation | None:
        """Runs a jitted `make_eval_step` over everything, or over the sample.

        Args:
          eval_step: the jitted function.
          variables: of the model.
          stop: asked between batches; where it says so, the result is None.
          put: places an array with one entry per window on the devices.
          whole: whether to take all windows; their bytes are counted, those of a sample
            taken to be its share of them.
        """
        totals = []
        for chosen in (self._sample, self._rest if whole else self._rest[:0]):
            sums: list[jax.Array] = []
            for windows, weights in self._batches(chosen):
                if stop():
                    return None
                sums.append(eval_step(variables, put(windows), put(weights)))
                if len(sums) > 1:
                    # Bounds the queue, keeps one in flight.
                    sums[-2].block_until_ready()
            totals.append(sum(float(s) for s in jax.device_get(sums)))
        sampled = totals[0] / self.sampled_tokens
        if len(self._rest) == 0:
            return Evaluation(sampled, self.tokens, self.bytes)
        if whole:
            loss = sum(totals) / self.tokens
            return Evaluation(loss, self.tokens, self.bytes, sampled)
        share = round(self.bytes * self.sampled_tokens / self.tokens)
        return Evaluation(sampled, self.sampled_tokens, share)


def validation_set(
    architecture: Architecture,
    split: Split,
    tokenizer: Tokenizer,
    parts: int = 1,
    limit: int = 0,
) -> ValidationSet:
    """The held-out windows of a corpus, in batches of `batch_rows`.

    Batches can be cut into ``parts`` equal ones; for ``limit`` see `ValidationSet`.
    """
    return ValidationSet(
        split.validation,
        tokenizer,
        seq_len=architecture.max_seq_len,
        batch_size=batch_rows(architecture, parts),
        parts=parts,
        limit=limit,
        ends=split.validation_ends,
    )


def batch_rows(architecture: Architecture, parts: int = 1) -> int:
    """Windows of a batch, of about `TOKENS` tokens, on ``parts`` devices.

    Fewer where one token's logits in each window, or the scores of attention, would
    take more than they may.
    """
    a = architecture
    rows = min(
        TOKENS // a.max_seq_len,
        LOGITS_BYTES // (4 * a.vocab_size) * parts,
        SCORES_BYTES // (4 * a.n_heads * a.max_seq_len**2) * parts,
    )
    return max(1, rows)


def make_eval_step(
    model: Vaani, logits_bytes: int = LOGITS_BYTES
) -> Callable[[Tree, Array, Array], Array]:
    """Builds the evaluation step; jit it.

    Args:
      model: with its vocabulary.
      logits_bytes: the most that logits take at a time on one device, unless those of
        one token in each window take more.

    Returns:
      A function of variables, tokens [B, T + 1] and weights [B]; it returns the
      summed negative log-likelihood in nats of the rows, times their weights.
    """

    def losses_of(variables: Tree, inputs: Array, targets: Array) -> Array:
        """Negative log-likelihoods [B, T]."""
        batch, length = inputs.shape
        # What a device holds of the logits of one position.
        column = 4 * batch * model.architecture.vocab_size // shards(BATCH)
        column //= shards("tensor")
        count = -(-length // max(1, logits_bytes // max(1, column)))
        if count == 1:
            logits: Any = model.apply(variables, inputs)
            return -log_likelihood(logits, targets)
        # Each piece as long as any other: padding adds less than one position to each.
        piece = -(-length // count)
        padding = ((0, 0), (0, count * piece - length))
        states: Any = model.apply(variables, inputs, logits=False)
        states = jnp.pad(states, (*padding, (0, 0)))
        targets = jnp.pad(targets, padding)

        def losses_at(first: Array) -> Array:
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=piece
            )
            logits: Any = model.apply(variables, cut(states, axis=1), method="head")
            return -log_likelihood(logits, cut(targets, axis=1))

        found = jax.lax.map(losses_at, piece * jnp.arange(count))  # [count, B, piece]
        return found.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    def eval_step(variables: Tree, tokens: Array, weights: Array) -> Array:
        losses = losses_of(variables, tokens[:, :-1], tokens[:, 1:])
        return jnp.sum(losses.sum(axis=-1) * weights)

    return eval_step
