"""Progress for people: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable
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
from vaani_jax.words import duration, first_line

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
        self._lost = False
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
            self._show(self._live.__enter__)
        return self

    def __exit__(self, *details: Any) -> None:
        if self._live:
            self._show(functools.partial(self._live.__exit__, *details))

    def _show(self, action: Callable[[], Any]) -> None:
        """Shows something; where nobody can see it any more, shows no more."""
        if self._lost:
            return
        try:
            action()
        # Rich leaves with status 1 where the reader of a pipe has left.
        except (OSError, ValueError, SystemExit) as error:
            self._lost = True
            live, self._live = self._live, None
            if live:  # which holds standard output and error
                with contextlib.suppress(OSError, ValueError, SystemExit):
                    live.stop()
            self._console.quiet = True
            left = isinstance(error, SystemExit)
            reason = "nobody reads it" if left else first_line(error)
            with contextlib.suppress(OSError, ValueError):
                print(f"nothing more is shown: {reason}", file=sys.stderr, flush=True)

    def update(self, step: int, values: Row, eta_seconds: float) -> None:
        """Shows the state of a run after ``step`` steps."""
        self._values |= values
        self.eta = eta_seconds
        if self._live:
            self._progress.update(self._task, completed=step)
            self._refresh()
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._line(f"step {step:>6,}/{self._num_steps:,}  {self._summary()}")

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._line(message)

    def print(self, table: Table) -> None:
        """Prints a table."""
        self._show(lambda: self._console.print(table))

    def _line(self, message: str) -> None:
        self._show(
            lambda: self._console.print(
                message, highlight=False, soft_wrap=True, markup=False
            )
        )

    def _refresh(self) -> None:
        if self._live:
            self._show(functools.partial(self._live.update, self._render()))

    def note(self, message: str) -> None:
        """What is going on besides training; empty for nothing."""
        self._note = message
        if self._live:
            self._refresh()
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
