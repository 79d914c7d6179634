"""What soak.py lets befall a job: which processes a kill hits, damaged files, a full disk."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.marked import Marked

STARTERS = ("mpirun", "horovodrun", "torchrun")


class Job(Protocol):
    """A job whose runs lie in a folder, and whose output in a log."""

    runs: Path
    log: Path

    def checkpoints(self) -> list[Path]:
        """Return the manifests, the newest last."""

    def wait(self, reached: Callable[[], bool], pause: float) -> None:
        """Wait until something holds, or the run is complete."""


def victims(kind: str, processes: Marked, draw: random.Random) -> list[int]:
    """Return what to kill; [] if there is no such process now."""
    words, ranks = processes.words(), processes.ranks()
    launchers = [
        pid for pid, command in words.items()
        if "launch.supervise" not in command
        and any(os.path.basename(word) in STARTERS for word in command[:2])
    ]  # fmt: skip
    supervisors = [pid for pid, command in words.items() if "launch.supervise" in command]
    loaders = [pid for pid, command in words.items() if any("forkserver" in w for w in command)]
    if kind == "host":
        host = f"HOST_OF_SOAK={draw.choice('abcd')}".encode()
        return [pid for pid in words if host in _environment(pid)]
    everything = list(words)
    found = {"all ranks": ranks, "launcher": launchers, "supervisor": supervisors,
             "everything": everything}.get(kind)  # fmt: skip
    if found is None:
        candidates = ranks if kind == "rank" else loaders
        found = [draw.choice(candidates)] if candidates else []
    return found


def _environment(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def damage(job: Job, draw: random.Random) -> bool:
    """Flip a bit of a file of the newest checkpoint, or cut it, if there is one before it."""
    manifests = job.checkpoints()
    if len(manifests) < 2:
        return False
    files = [p for p in manifests[-1].parent.glob(f"{manifests[-1].stem}.*") if p.is_file()]
    with suppress(OSError):  # the job is writing: it may be gone
        path = draw.choice(files)
        data = bytearray(path.read_bytes())
        if draw.random() < 0.5:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        return True
    return False


def fill_up(job: Job) -> None:
    """Let the disk be full until a checkpoint has failed by it."""
    filler, told = job.runs / "filler", job.log.read_text(errors="replace").count("No space left")
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    try:
        job.wait(lambda: job.log.read_text(errors="replace").count("No space left") > told, 0.05)
    finally:
        filler.unlink(missing_ok=True)
