"""TensorBoard events, written by the thread that reports them.

tensorboardX's SummaryWriter leaves that to a thread, which ends when the disk is full; its queue
then blocks the run for ever. Here a failure is told, and a new file is tried at the next flush.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FLUSH_S = 30


@cache
def _cleaned(tag: str) -> str:
    """Return a tag as TensorBoard allows it: other characters than these become _."""
    return re.sub(r"[^-/\w.]", "_", tag).lstrip("/")


class Events:
    """The events of one process, in one file or, after failures, in several.

    Args:
        first_example: events of earlier processes from here on are dropped by TensorBoard.
        complain: is given what the system says when a file cannot be written.
    """

    def __init__(
        self, folder: Path, first_example: int, complain: Callable[[OSError], None]
    ) -> None:
        self._folder, self._first_example, self._complain = folder, first_example, complain
        self._file: Any = None
        self._num_files, self._flushed_at = 0, 0.0
        self._attempt(self._open)

    def scalars(
        self, values: Mapping[str, float], example: int, wall_time: float | None = None
    ) -> None:
        """wall_time: None: now."""
        if self._file is None:
            return
        self._attempt(lambda: self._write(values, example, wall_time or time.time()))
        if time.monotonic() - self._flushed_at > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write to disk what is not there yet; after a failure, open a new file."""
        self._flushed_at = time.monotonic()
        if self._file is None:
            self._attempt(self._open)
        if self._file is not None:
            self._attempt(self._file.flush)

    def close(self) -> None:
        if self._file is not None:
            self._attempt(self._file.close)
            self._file = None

    def _open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        suffix = f".{os.getpid()}.{self._num_files}"
        self._num_files += 1
        file = EventsWriter(str(self._folder / "events"), suffix)
        self._file, first = file, self._first_example
        file.write_event(Event(step=first, file_version="brain.Event:2"))
        file.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, values: Mapping[str, float], example: int, wall_time: float) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(step=example, wall_time=wall_time)
        for tag, value in values.items():
            event.summary.value.add(tag=_cleaned(tag), simple_value=float(value))
        self._file.write_event(event)
        self._first_example = max(self._first_example, example + 1)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):  # what it still holds cannot be written either
                    file.close()
            self._complain(error)
