"""A program and all that comes of it: started, signalled and ended as one. Standard library only.

Linux's "child subreaper" makes this process the parent of every process below it whose own parent
has ended, so that none is lost from sight, whatever groups and sessions launchers put them in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)

GRACE_S = 2.0  # in which what is left of a job ends by itself, and again after SIGTERM


def become_subreaper() -> None:
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start(words: Sequence[str], environment: dict[str, str], **pipes: int) -> subprocess.Popen:
    """Start a program in a session of its own; it ends by SIGTERM if this process is killed."""
    parent = os.getpid()

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return subprocess.Popen(
        words, env=environment, start_new_session=True, preexec_fn=prepare, **pipes
    )


def descendants() -> list[int]:
    """Return the processes below this one that have not ended."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (fields := _status(folder)):
            state, parent = fields
            if state != "Z":
                children.setdefault(parent, []).append(int(folder.name))
    found, below = [], [os.getpid()]
    while below:
        new = children.get(below.pop(), [])
        found += new
        below += new
    return found


def _status(folder: Path) -> tuple[str, int] | None:
    """Return a process's state and parent; None if it has ended."""
    try:
        # Bytes: a process's name, in brackets, may end within a letter.
        state, parent, *_ = (folder / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return state.decode(), int(parent)


def is_alive(pid: int) -> bool:
    """Tell whether a process has not ended; one that waits to be buried has."""
    fields = _status(Path(f"/proc/{pid}"))
    return fields is not None and fields[0] != "Z"


def words_of(pid: int) -> list[str]:
    """Return a process's command by words; only an empty one if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return [""]


def environment_of(pid: int) -> set[str]:
    """Return the names of the variables that a process was started with."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return set()
    return {pair.partition(b"=")[0].decode(errors="replace") for pair in pairs}


def listens(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal; not if it has ended."""
    try:
        handled = re.search(rb"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_bytes(), re.M)
    except OSError:
        return False
    return handled is not None and bool(int(handled[1], 16) >> (number - 1) & 1)


def send(number: int, pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def wait(process: subprocess.Popen) -> int:
    """Wait until a program ends, and bury those of its descendants that end before it."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == process.pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode


def end_descendants(grace_s: float = GRACE_S) -> None:
    """Return when nothing is left below this process: at first it is waited for, then ended."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        if number is not None:
            send(signal.SIGCONT, descendants())  # a stopped process would not hear
            send(number, descendants())
        while time.monotonic() < deadline:
            _bury()
            if not descendants():
                return
            time.sleep(0.02)


def _bury() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
