"""What killed ranks leave on a machine: Python's folders and semaphores for their loader processes.

Python removes them when a rank ends, and its resource tracker the semaphores when a rank is killed;
but launchers kill the tracker too. So ranks name them after themselves, and whoever comes later
removes what is named after a process that is no more.
"""

from __future__ import annotations

import contextlib
import multiprocessing.process
import multiprocessing.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch import processes

_SEMAPHORES = Path("/dev/shm")
_PREFIX = "parsimony-rank"
_NAME = re.compile(rf"(?:sem\.)?{_PREFIX}-(\d+)-(\d+)-\w+")  # namespace of processes, process


def name_ours() -> None:
    """Let what multiprocessing makes for this process, and its children, have names that `sweep`
    knows. Before the first of it is made."""
    name = f"{_PREFIX}-{_namespace()}-{os.getpid()}"
    config = multiprocessing.process.current_process()._config  # where Python itself keeps these
    if config.get("tempdir") is None:
        folder = tempfile.mkdtemp(prefix=f"{name}-")
        multiprocessing.util.Finalize(
            None, shutil.rmtree, args=(folder, True), exitpriority=-100
        )  # as Python does, after all else
        config |= {"semprefix": f"/{name}", "tempdir": folder}


def sweep() -> None:
    """Remove what is left of this user's ranks on this machine that have ended."""
    for path in left():
        with contextlib.suppress(OSError):  # somebody else has just removed it
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def left() -> Iterator[Path]:
    """Yield what `sweep` removes."""
    temporary = Path(tempfile.gettempdir())
    for path in (*_SEMAPHORES.glob(f"sem.{_PREFIX}-*"), *temporary.glob(f"{_PREFIX}-*")):
        found = _NAME.fullmatch(path.name)
        if found is None or int(found[1]) != _namespace() or processes.is_alive(int(found[2])):
            continue
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                yield path


def _namespace() -> int:
    """Return the number of the namespace in which process numbers hold: a container's own."""
    return os.stat("/proc/self/ns/pid").st_ino
