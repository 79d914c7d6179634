"""What a job prints: passed through as it comes, and read for what a supervisor must know of it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

_FOLDER = re.compile(r"folder of this run: (/.*?)(?: \(.*\))?$")
# What ranks print: at the first step, when a signal has stopped the run, and of a failure.
_BEGINNING, _STOPPED, _FAILURE = (
    "training begins", "stopped by a signal", "failed and ends the job"
)  # fmt: skip
_LONGEST_MESSAGE = 30  # lines


class Output:
    """One start's output. is_read: else it goes where this process's own goes, unread."""

    def __init__(self, is_read: bool) -> None:
        self._is_read = is_read
        self.folder: Path | None = None
        """The run's, as rank 0 has told it."""
        self.has_failed_early = True
        """Whether the ranks never came to train."""
        self.was_stopped = False
        """Whether ranks have ended because they got a signal."""
        self._first_step = -1
        self._failures: list[list[str]] = []  # what failing ranks have said, in two streams
        self._last: deque[str] = deque(maxlen=10)
        self._readers: list[threading.Thread] = []

    def pipes(self) -> dict[str, int]:
        return {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if self._is_read else {}

    def follow(self, process: subprocess.Popen) -> None:
        """Begin to pass on what a process prints."""
        if not self._is_read:
            return
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            reader = threading.Thread(target=self._copy, args=(source, target.buffer), daemon=True)
            reader.start()
            self._readers.append(reader)

    def finish(self) -> None:
        """Wait for the rest of it. When nothing is left that could print more."""
        for reader in self._readers:
            reader.join(timeout=5)

    def _copy(self, source: BinaryIO, target: BinaryIO) -> None:
        rest, is_heard, failure = b"", True, None
        while piece := source.read1(2**16):
            try:
                if is_heard:
                    target.write(piece)
                    target.flush()
            except OSError:  # nobody reads it any more: the job need not end for that
                is_heard = False
            *lines, rest = re.split(rb"[\r\n]", rest + piece)
            for line in lines:
                failure = self._read(line.decode(errors="replace"), failure)
        self._read(rest.decode(errors="replace"), failure)

    def _read(self, line: str, failure: list[str] | None) -> list[str] | None:
        """Note what a line tells; return the failing rank's lines that it is among, if it is."""
        if not any(map(str.isalnum, line)):  # an empty one, or what mpirun frames its own with
            return failure if line.strip() == "" else None
        if found := _FOLDER.search(line):
            self.folder = Path(found[1])
            self._first_step = newest_step(self.folder)
        self.has_failed_early &= _BEGINNING not in line
        self.was_stopped |= _STOPPED in line
        self._last.append(line)
        if _FAILURE in line:
            failure = []
            self._failures.append(failure)
        if failure is not None and len(failure) < _LONGEST_MESSAGE:
            failure.append(line)
        return failure

    @property
    def has_progressed(self) -> bool:
        """Whether the run has a newer checkpoint than when it told its folder."""
        return newest_step(self.folder) > self._first_step

    @property
    def message(self) -> str:
        """Return why the job ended: what the first rank to fail said, or the last lines."""
        lines = self._failures[0] if self._failures else self._last
        return "\n".join(f"  | {line}" for line in lines)

    def is_like(self, other: Output) -> bool:
        """Whether both jobs ended for the same reason, whatever ranks and times it names."""
        return re.sub(r"\d+", "", self.message) == re.sub(r"\d+", "", other.message)


def newest_step(folder: Path | None) -> int:
    """Return the step of a run's newest checkpoint; -1 if none can be seen from here."""
    paths = [] if folder is None else (folder / "checkpoints").glob("step-*.json")
    found = [re.fullmatch(r"step-(\d+)\.json", path.name, re.ASCII) for path in paths]
    return max((int(match[1]) for match in found if match), default=-1)
