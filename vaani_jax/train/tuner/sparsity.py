"""Ternary thresholds are moved until every kernel's share of zeros is in the band.

They follow from the Gaussian of the kernels: the share of zeros of ``N(0, sigma^2)`` at
``tau`` is ``erf(c tau)``, so that a kernel with share ``s`` comes to the share ``a`` at
``tau * P((1 + a) / 2) / P((1 + s) / 2)``, P the normal quantile.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.memory import Memory, Summary
from vaani_jax.train.tuner.rule import Change, Rule
from vaani_jax.words import plural

Array = jax.Array

RATE = 1.15  # largest factor on a threshold per interval
LOWEST, HIGHEST = 0.02, 5.0  # thresholds, in units of mean|W|
MARGIN = 0.25  # share of the band at either edge that is left in time


def zeros_share(codes: Array) -> Array:
    """Share of zeros of codes [..., K, N]: [...]."""
    return jnp.mean(codes == 0, axis=(-2, -1), dtype=jnp.float32)


class Sparsity(Rule):
    """Sets thresholds; they are variables of the model, not its own state."""

    def adjust(
        self, state: None, memory: Memory, seen: Summary
    ) -> tuple[None, dict[str, Change]]:
        """Moves each threshold in its own direction; the cause of a change is the share
        of zeros that was seen."""
        del state, memory
        if self.setup.band is None:
            return None, {}
        low, high = self.setup.band
        rate = self.setup.factor(RATE)
        aim, edge = (low + high) / 2, (high - low) * MARGIN
        changes = {}
        for name, tau in seen.thresholds.items():
            zeros = zeros_share(seen.codes[name])
            share = jnp.clip(zeros, 0.01, 0.99)
            step = ndtri((1 + aim) / 2) / ndtri((1 + share) / 2)
            step = jnp.clip(step, 1 / rate, rate)
            moved = jnp.clip(tau * step, LOWEST, HIGHEST)
            outside = (zeros < low + edge) | (zeros > high - edge)
            new = jnp.where(outside, moved, tau).astype(tau.dtype)
            changes[name] = Change(tau, new, zeros)
        return None, changes

    def tell(self, step: int, change: dict[str, Change], journal: Journal) -> None:
        for name, one in change.items():
            before, after = np.ravel(one.old), np.ravel(one.new)
            zeros = np.ravel(one.cause)
            for i in np.flatnonzero(before != after):
                kernel = name if one.old.ndim == 0 else f"{name}[{i}]"
                cause = f"share of zeros {zeros[i]:.3f}"
                journal.record(
                    step, "threshold", cause, before[i], after[i], kernel=kernel
                )

    def summary(self, events: Sequence[Event]) -> list[str]:
        kernels = [e["kernel"] for e in events if e["setting"] == "threshold"]
        if not kernels:
            return []
        moves = plural(len(kernels), "threshold move")
        return [f"{moves} in {plural(len(set(kernels)), 'kernel')}"]
