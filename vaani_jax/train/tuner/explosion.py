"""A step that is far larger than usual is skipped; its update may only be shrunk."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event
from vaani_jax.train.tuner.memory import LOSSES, Memory
from vaani_jax.train.tuner.rule import Rule
from vaani_jax.train.tuner.verdict import ACCEPTED, GRADIENT, SHRUNK, UPDATE, Verdict
from vaani_jax.words import plural

Array = jax.Array

# Skipped steps running that are borne; more are a divergence where the gradients
# explode, and are let through, shrunk, where only the update does.
PATIENCE = 30
UPDATE_SKIP_RATIO = 20.0  # update norm over its running median to skip a step at
UPDATE_RATIO = 5.0  # and to shrink updates to


class Explosion(Rule):
    """Compares norms with their medians, which are kept in the memory."""

    def gradients(self, memory: Memory, held: Array, gradient_norm: Array) -> Array:
        """Whether they explode."""
        # The first steps of healthy runs have spikes of their own, and a range test is
        # there to explode.
        return (
            (memory.count >= LOSSES)
            & (held == 0)
            & (gradient_norm > self.setup.config.skip_ratio * memory.gradient_median)
        )

    def judge(
        self,
        memory: Memory,
        *,
        held: Array,
        ramp: Array,
        gradient_norm: Array,
        update_norm: Array,
    ) -> tuple[Array, Array]:
        """Kind of a verdict on a finite step, and the factor to shrink its update by.

        Args:
          memory: as the last step left it.
          held: learning rate of a range test; 0 outside of one.
          ramp: share of the warm-up done.
          gradient_norm, update_norm: of the step.
        """
        # Updates grow by themselves during warm-up, and in a range test.
        warm = (ramp >= 1) & (held == 0)
        ratio = jnp.where(warm, update_norm / memory.update_median, 0.0)
        leaps = (ratio > UPDATE_SKIP_RATIO) & (memory.running < PATIENCE)
        kind = jnp.where(
            self.gradients(memory, held, gradient_norm),
            GRADIENT,
            jnp.where(leaps, UPDATE, jnp.where(ratio > UPDATE_RATIO, SHRUNK, ACCEPTED)),
        )
        return kind, UPDATE_RATIO * memory.update_median / update_norm

    def cause(self, verdict: Verdict, layer: str) -> str:
        """Why a step was skipped or shrunk; of a fetched verdict."""
        kind = int(verdict.kind)
        words = {
            GRADIENT: "gradients explode",
            UPDATE: "update explodes",
            SHRUNK: "update oversized",
        }[kind]
        cause = f"{words}: norm {verdict.value:.3g}, usually {verdict.usual:.3g}"
        return f"{cause}; foremost in {layer}" if kind == GRADIENT else cause

    def summary(self, events: Sequence[Event]) -> list[str]:
        """Of all steps that were skipped or shrunk, not finite ones too."""
        counts = {
            done: sum(event.get("done") == done for event in events)
            for done in ("skipped", "shrunk")
        }
        return [f"{plural(n, 'step')} {done}" for done, n in counts.items() if n]
