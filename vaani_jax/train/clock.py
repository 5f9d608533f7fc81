"""The time that a run spends on training, and on nothing else."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax


class Clock:
    """Times training steps; compilation, evaluations and the like are left out.

    Attributes:
      elapsed: seconds of training, those of earlier sessions included.
      seconds_per_step: at the last lap; 0 before it.
    """

    def __init__(self, elapsed: float) -> None:
        self.elapsed = elapsed
        self.seconds_per_step = 0.0
        self._since = self._began = time.perf_counter()
        self._more_steps = 0

    def restart(self, more_steps: int = 0) -> None:
        """Forgets the time since the last lap.

        Args:
          more_steps: to count in the next lap besides those that it is told of; -1
            where the time of one of them has just been forgotten.
        """
        self._since = time.perf_counter()
        self._more_steps = more_steps

    @contextlib.contextmanager
    def pause(self, state: Any) -> Iterator[None]:
        """Leaves out what happens inside, once the steps that make ``state`` end."""
        jax.block_until_ready(state)
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def lap(self, steps: int) -> float:
        """Ends a lap of ``steps`` steps; returns steps per second, 0 if unknown."""
        now = time.perf_counter()
        seconds = now - self._since
        self._since = now
        steps += self._more_steps
        self._more_steps = 0
        self.elapsed += seconds
        if steps <= 0 or seconds <= 0:
            return 0.0
        self.seconds_per_step = seconds / steps
        return steps / seconds

    def session(self) -> float:
        """Seconds since the session began, everything included."""
        return time.perf_counter() - self._began
