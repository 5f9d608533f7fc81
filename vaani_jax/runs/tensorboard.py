"""TensorBoard event files.

Written as they come, without the queue and the thread that tensorboardX puts before its
files: where the thread dies of a full disk, the queue fills, and then blocks for ever.
"""

import pathlib
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vaani_jax.runs.metrics import Row, metric


class EventWriter:
    """One event file for a session; none where nothing is written."""

    def __init__(self, folder: pathlib.Path, start_step: int) -> None:
        self._folder = folder
        self._start = start_step
        self._writer: EventsWriter | None = None

    def scalars(self, step: int, row: Row) -> None:
        """Writes numbers by name; raises OSError."""
        for key, value in row.items():
            title = metric(key).title
            self._write(step, summary.scalar(key, value, summary_description=title))
        if self._writer is not None:
            self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text; raises OSError."""
        self._write(step, summary.text(tag, text))
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int, content: Any) -> None:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"))
            # What an earlier session wrote beyond its checkpoint counts no more.
            begun = SessionLog(status=SessionLog.START)
            self._put(Event(session_log=begun, step=self._start + 1))
        self._put(Event(summary=content, step=step))

    def _put(self, event: Event) -> None:
        assert self._writer is not None
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
