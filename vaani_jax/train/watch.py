"""A watch over a run: it must stop when told to, and say what it waits for.

Python runs its handlers of signals between two of its own operations, so never while
the process waits in a compiler, a file system or another process. A thread of its own
sees to what must happen all the same.
"""

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vaani_jax.words import duration

PATIENCE = 60.0  # seconds without a step, after which people are told
GRACE = 25.0  # seconds that a run has to save and leave
LOOK = 5.0  # seconds between looks; 1 at most where told to stop
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORCING = (signal.SIGTERM, signal.SIGHUP)  # a person's Ctrl-C can be repeated


class Watch:
    """Knows what a run is at, and whether it was told to stop."""

    def __init__(
        self, say: Callable[[str], None], alive: Callable[[], None] = lambda: None
    ) -> None:
        """Watches nothing before `watching`.

        Args:
          say: receives lines for people.
          alive: called every few seconds.
        """
        self._say = say
        self._alive = alive
        self._caught: list[int] = []
        self._stage = "the start"
        self._since = time.monotonic()
        self._next = PATIENCE
        self._over = threading.Event()

    def __call__(self) -> bool:
        """Whether to stop."""
        return bool(self._caught)

    def step(self) -> None:
        """A step is done."""
        self._since = time.monotonic()
        self._next = PATIENCE

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """What the run waits for, as a noun: an evaluation, a checkpoint."""
        before, self._stage = self._stage, stage
        self.step()
        try:
            yield
        finally:
            self._stage = before
            self.step()

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watch"]:
        """Turns signals into the answer of this object, and watches."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        old: dict[int, Any] = {}
        wakeup: int | None = None
        with contextlib.suppress(ValueError):  # not the main thread: others handle it
            for number in STOPPING:
                # What nohup has the process ignore stays ignored.
                ignored = signal.getsignal(number) == signal.SIG_IGN
                if not (ignored and number == signal.SIGHUP):
                    old[number] = signal.signal(number, self._handle)
            wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            if wakeup is not None:
                signal.set_wakeup_fd(wakeup)
            for caught, handler in old.items():
                signal.signal(caught, handler)
            os.close(writer)  # which ends the thread's wait
            thread.join(5.0)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught.append(number)

    def _watch(self, reader: int) -> None:
        """Runs in a thread: says what is waited for, ends what can't end itself."""
        deadline: float | None = None
        while not self._over.is_set():
            ready, _, _ = select.select(
                [reader], [], [], min(1.0, LOOK) if deadline else LOOK
            )
            numbers = os.read(reader, 64) if ready else b""
            if ready and not numbers:
                break
            if deadline is None and any(number in FORCING for number in numbers):
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                self._leave()
            self._alive()
            waited = time.monotonic() - self._since
            if waited > self._next:
                self._next *= 2
                line = f"no step for {duration(waited)}: waiting for {self._stage}"
                _aside(functools.partial(self._say, line))
        os.close(reader)

    def _leave(self) -> None:
        line = (
            f"error: told to stop {GRACE:.0f} s ago, and still waiting for"
            f" {self._stage}: left. The last checkpoint is whole; the same command"
            " goes on from it\n"
        )
        _aside(functools.partial(os.write, 2, line.encode())).join(1.0)
        os._exit(128 + signal.SIGTERM)


def _aside(action: Callable[[], Any]) -> threading.Thread:
    """Does it in a thread of its own: what is watched may be what it waits for, too."""

    def act() -> None:
        # Rich leaves with status 1 where the reader of a pipe has left.
        with contextlib.suppress(Exception, SystemExit):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread
