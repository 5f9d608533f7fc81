"""TensorBoard event files.

Records are written as they come, without the queue and the thread that tensorboardX
puts before its files: where the thread dies of a full disk, the queue fills, and then
blocks for ever. A record is in the file whole or not at all.
"""

import contextlib
import errno
import os
import pathlib
import socket
import struct
import time
from typing import Any

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from vaani_jax.files import naming
from vaani_jax.runs.metrics import Row, metric


class EventWriter:
    """One event file for a session; none where nothing is written."""

    def __init__(self, folder: pathlib.Path, start_step: int) -> None:
        """Touches no file yet.

        Args:
          folder: receives the file.
          start_step: of the session; TensorBoard forgets what came after it.
        """
        self._folder = folder
        self._start = start_step
        self._path = folder
        self._file: Any = None

    def scalars(self, step: int, row: Row) -> None:
        """Writes numbers by name; raises OSError."""
        values = [
            value
            for key, number in row.items()
            for value in summary.scalar(
                key, number, summary_description=metric(key).title
            ).value
        ]
        self._write(Event(step=step, summary=summary.Summary(value=values)))

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text; raises OSError."""
        self._write(Event(step=step, summary=summary.text(tag, text)))

    def close(self) -> None:
        """Closes the file; what is written after it opens another."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: Event) -> None:
        with naming(self._path):
            if self._file is None:
                self._open()
            self._put([event])

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._path = self._folder / f"{name}.{os.getpid()}"
        # Unbuffered: nothing is left to be written when it is closed.
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        try:
            # What an earlier session wrote beyond its checkpoint counts no more.
            begun = SessionLog(status=SessionLog.START)
            first = Event(session_log=begun, step=self._start + 1)
            self._put([Event(file_version="brain.Event:2"), first])
        except OSError:
            self.close()
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise

    def _put(self, events: list[Event]) -> None:
        """Appends records: their length and themselves, a checksum behind each."""
        records = b""
        for event in events:
            event.wall_time = time.time()
            body = event.SerializeToString()
            for part in (struct.pack("<Q", len(body)), body):
                records += part + struct.pack("<I", masked_crc32c(part))
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(records) != len(records):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
