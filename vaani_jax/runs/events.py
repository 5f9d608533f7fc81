"""TensorBoard's event files, for those who look at runs with it.

Records are written at once, by whoever has them: tensorboardX's own writer hands them
to a thread that ends with the first error of the disk, and its queue, once full, then
blocks the run for ever.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar, text

from vaani_jax.words import first_line


class Events:
    """An event file of a session, there from its first record on.

    What keeps it from being written ends it, not the run.
    """

    def __init__(
        self, folder: pathlib.Path, start_step: int, say: Callable[[str], None]
    ) -> None:
        """Touches no file yet.

        Args:
          folder: receives the file.
          start_step: of the session; TensorBoard forgets what came after it.
          say: receives a line where the file can't be written.
        """
        self._folder, self._start_step, self._say = folder, start_step, say
        self._file: Any = None
        self._lost = False

    def add_scalars(
        self, step: int, values: Mapping[str, float], titles: Mapping[str, str]
    ) -> None:
        """Adds numbers by name, with what to call them."""
        made = [scalar(k, v, summary_description=titles[k]) for k, v in values.items()]
        parts = [value for summary in made for value in summary.value]
        self._add(Event(step=step, summary=Summary(value=parts)))

    def add_text(self, step: int, tag: str, content: str) -> None:
        """Adds a text."""
        self._add(Event(step=step, summary=text(tag, content)))

    def close(self) -> None:
        """Closes the file; what is added after it opens another."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, event: Event) -> None:
        if self._lost:
            return
        try:
            if self._file is None:
                self._open()
            self._write(event)
        except OSError as error:
            self._lost = True
            self._say(
                f"TensorBoard is left out from step {event.step:,} on: can't write to"
                f" {self._folder}: {error.strerror or first_line(error)}"
            )
            self.close()

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        # Unbuffered: nothing is left to be written when it is closed.
        path = self._folder / f"{name}.{os.getpid()}"
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        after, version = self._start_step + 1, "brain.Event:2"
        self._write(Event(file_version=version))
        begun = SessionLog(status=SessionLog.START)
        self._write(Event(step=after, file_version=version))
        self._write(Event(step=after, session_log=begun))

    def _write(self, event: Event) -> None:
        """Writes a record: its length and itself, a checksum behind each."""
        event.wall_time = time.time()
        body = event.SerializeToString()
        length = struct.pack("<Q", len(body))
        marks = [struct.pack("<I", masked_crc32c(part)) for part in (length, body)]
        record = length + marks[0] + body + marks[1]
        if self._file.write(record) != len(record):
            raise OSError("the disk takes no more")
