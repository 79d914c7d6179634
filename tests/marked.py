"""Finding every process that a test has started, wherever launchers put it: by its environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

NAME = "PARSIMONY_TEST_MARK"
_RANK_NAMES = (b"OMPI_COMM_WORLD_RANK=", b"HOROVOD_RANK=", b"RANK=")


class Marked:
    """The living processes whose environment carries this mark; what a test starts inherits it."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def words(self) -> dict[int, list[str]]:
        """Return pid -> command of every such process, except for this one."""
        mark, found = f"{NAME}={self.mark}".encode(), {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[int(folder.name)] = words[:-1]
        found.pop(os.getpid(), None)
        return found

    def ranks(self) -> list[int]:
        """Return the pids of train.py's ranks."""
        return [pid for pid, words in self.words().items() if _is_rank(pid, words)]

    def left(self, seconds: float = 5) -> dict[int, list[str]]:
        """Return what still lives after so long; {} as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (found := self.words()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def kill(self) -> None:
        for pid in self.words():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_rank(pid: int, words: list[str]) -> bool:
    if not any(os.path.basename(word) == "train.py" for word in words[1:4]):
        return False
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(variable.startswith(_RANK_NAMES) for variable in variables)
    return False


@contextlib.contextmanager
def marked() -> Iterator[Marked]:
    """Mark what this process starts in the block; what is left of it at the end is killed."""
    processes = Marked()
    os.environ[NAME] = processes.mark
    try:
        yield processes
    finally:
        del os.environ[NAME]
        processes.kill()
