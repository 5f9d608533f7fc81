"""Progress for people: a live bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Table

from vaani_jax.runs.metrics import METRICS, Row
from vaani_jax.words import duration

LINE_SECONDS = 5.0  # between plain lines, where there is no terminal


class Display:
    """Progress: a live bar on a terminal, plain lines elsewhere.

    Use as a context manager around the loop.
    """

    def __init__(self, console: Console, num_steps: int, start_step: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._start = start_step
        self._last_line = time.monotonic()
        self._values: Row = {}
        self._note = ""
        self.eta = 0.0
        self._live: Live | None = None
        # A dumb terminal can't move its cursor: it gets the plain lines.
        if console.is_terminal and not console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                console=console,
            )
            self._task = self._progress.add_task(
                "train", total=num_steps, completed=start_step
            )
            self._live = Live(
                self._render(), console=console, refresh_per_second=4, transient=True
            )

    def __enter__(self) -> "Display":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live:
            self._live.__exit__(*details)

    def update(self, step: int, values: Row, eta_seconds: float) -> None:
        """Shows the state of a run after ``step`` steps."""
        self._values |= values
        self.eta = eta_seconds
        if self._live:
            self._progress.update(self._task, completed=step)
            self._live.update(self._render())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(
                f"step {step:>6,}/{self._num_steps:,}  {self._summary()}",
                highlight=False,
                soft_wrap=True,
            )

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def print(self, table: Table) -> None:
        """Prints a table."""
        self._console.print(table)

    def note(self, message: str) -> None:
        """What is going on besides training; empty for nothing."""
        self._note = message
        if self._live:
            self._live.update(self._render())
        elif message and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(message)

    def _summary(self) -> str:
        v = self._values
        parts = [self._note] if self._note else []
        parts += [
            known.console.format(known.shown(v[key]))
            for key, known in METRICS.items()
            if known.console and key in v
        ]
        if self.eta:
            parts.append(f"ETA {duration(self.eta)}")
        return "  ".join(parts)

    def _render(self) -> Table:
        grid = Table.grid()
        grid.add_row(self._progress)
        grid.add_row(self._summary())
        return grid
