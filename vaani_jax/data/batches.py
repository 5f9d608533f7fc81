"""Batches as a pure function of (seed, step), and all held-out windows.

Training windows are ``seq_len + 1`` tokens, so that inputs and targets overlap by all
but one. Each epoch cuts the training part afresh, at an offset of its own, and takes
its windows in an order of its own; nothing has to be saved to resume in the middle.
"""

import grain
import numpy as np


class Batches:
    """Training batches: random access, a pure function of seed and step.

    Attributes:
      windows_per_epoch: windows in one pass; the last offset of an epoch may leave a
        remainder shorter than a window, which other epochs cover.
      steps_per_epoch: whole batches in one pass.
    """

    def __init__(
        self, tokens: np.ndarray, *, seq_len: int, batch_size: int, seed: int
    ) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed
        # One window short, so that any offset below seq_len fits.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // seq_len - 1)
        self.steps_per_epoch = max(1, self.windows_per_epoch // batch_size)
        self._batch_size = batch_size
        self._windows = (
            grain.MapDataset.range(self.windows_per_epoch)
            .seed(seed)
            .shuffle()
            .repeat(None)
            .map_with_index(self._window)
        )

    def _offset(self, epoch: int) -> int:
        """Where this epoch's first window starts."""
        spare = len(self._tokens) - self.windows_per_epoch * self._seq_len
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return int(rng.integers(min(self._seq_len, spare)))

    def _window(self, index: int, window: int) -> np.ndarray:
        start = self._offset(index // self.windows_per_epoch) + window * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Token ids [batch_size, seq_len + 1], int32, of a step counted from 0.

        With ``rows``, only these are read.
        """
        first = step * self._batch_size
        wanted = range(self._batch_size)[rows]
        return np.stack([self._windows[first + row] for row in wanted])


def validation_windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """ALL non-overlapping windows [n, seq_len + 1] of the held-out part.

    Window i holds tokens ``i * seq_len`` to ``(i + 1) * seq_len`` inclusive: every
    token but the first is predicted at most once; fewer than ``seq_len`` at the end
    are left out. A view of the tokens, not a copy.
    """
    if len(tokens) < seq_len + 1:
        return np.zeros((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
