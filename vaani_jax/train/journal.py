"""The tuner's journal: every decision, on disk.

``tuner.jsonl`` holds one object a line: ``step`` (steps done when it was taken),
``setting``, ``cause``, ``old`` and ``new``; the kernel's name where the setting is one
kernel's.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

from vaani_jax.files import to_json, write_atomically
from vaani_jax.runs.metrics import read_records
from vaani_jax.runs.workdir import Workdir
from vaani_jax.words import first_line

Event = dict[str, Any]


def read_events(path: pathlib.Path) -> list[Event]:
    """Events of a tuner.jsonl; what is none, such as a line cut short, is left out."""
    keys = {"setting", "cause", "old", "new"}
    return [event for event in read_records(path) if keys <= event.keys()]


class Journal:
    """Writes down what the rules of the tuner decide, and shows what they say.

    Attributes:
      say: shows people a line.
      events: all of the run, those of earlier sessions included.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int, say: Callable[[str], None]
    ) -> None:
        self.say = say
        path = Workdir(workdir).events
        # A resumed run repeats the steps after its checkpoint: their events go. One
        # that begins again repeats the range test too, whose event is of step 0.
        self.events = [e for e in read_events(path) if e["step"] <= start_step > 0]
        self._path = path
        self._rewrite()
        self._whole = True

    def _rewrite(self) -> None:
        lines = "".join(to_json(event) + "\n" for event in self.events)
        write_atomically(self._path, lines.encode())

    def record(
        self, step: int, setting: str, cause: str, old: Any, new: Any, **more: Any
    ) -> None:
        """Writes one decision; where that fails, once more at the end."""
        event = {"step": step, "setting": setting, "cause": cause, **more}
        event |= {"old": _plain(old), "new": _plain(new)}
        self.events.append(event)
        if not self._whole:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(to_json(event) + "\n")
        except OSError as error:
            self._whole = False
            self.say(f"no line in {self._path.name}: {first_line(error)}")

    def close(self) -> None:
        if not self._whole:
            with contextlib.suppress(OSError):
                self._rewrite()


def _plain(value: Any) -> Any:
    """A JSON value; None for what JSON has no number for."""
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
