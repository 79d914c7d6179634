"""Let only one job at a time use a run's folder.

Rank 0 locks the file `lock` in the folder with flock; the system drops the lock when the process
ends, however it ends. On a file system without such locks, the content of the file decides: it
names the process that took the folder. If that process ran on this machine and has ended, the
folder is free. If it ran on another machine or in another container, nobody here can tell whether
it has ended, and a person must remove the file.
Not seen is a job whose lock does not leave its own host (NFS with local_lock, Lustre with
localflock), or that uses another disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.interfaces import Collectives

_SETTLED_S = 0.5  # without locks: of jobs that write the file within this time, the last one wins


class RunFolderError(Exception):
    """A run's folder cannot be used; the message says why, and what to do."""


@contextmanager
def held(folder: Path, comm: Collectives) -> Iterator[None]:
    """Keep a run's folder for this job alone while the block runs; make it if needed. A collective.

    Raises: RunFolderError, on every rank and before anything is written, if another job uses it.
    """
    file = problem = None
    if comm.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _take(folder)
        except RunFolderError as error:
            problem = f"{error}{_if_alone(comm)}"
        except OSError as error:
            problem = f"{folder} cannot be written ({error}); name another place with --runs"
    problem = comm.broadcast_object(problem)
    if problem:
        raise RunFolderError(problem)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(
                OSError
            ):  # whoever comes next sees that this process has ended
                os.ftruncate(file, 0)
            os.close(file)


def _take(folder: Path) -> int:
    """Lock the folder for this process; return the open file, which holds the lock."""
    path = folder / "lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        has_locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(_in_use(folder, _read(file))) from error
        except OSError:
            has_locks = False
            _refuse_living(folder, path, _read(file))
        mine = _this_process()
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(mine).encode(), 0)
        if not has_locks:
            time.sleep(_SETTLED_S)
            if (holder := _read(file)) != mine:
                raise RunFolderError(_in_use(folder, holder))
    except BaseException:
        os.close(file)
        raise
    return file


def _refuse_living(folder: Path, path: Path, holder: dict[str, Any]) -> None:
    """Refuse the folder unless what its holder wrote shows that the holder has ended.

    Args: holder: what the lock file says; {} if no process has written it.
    """
    mine = _this_process()
    if not holder:
        return
    if any(holder.get(key) != mine[key] for key in ("host", "namespace")):
        raise RunFolderError(
            f"{_in_use(folder, holder)}. Its file system has no locks, and whether that process "
            f"still runs cannot be known here, on {mine['host']}: if it does not, remove {path}"
        )
    if _started(holder.get("pid")) == holder.get("started"):
        raise RunFolderError(_in_use(folder, holder))


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another job has it"
    if holder:
        who = f"process {holder['pid']} on {holder['host']} has had it since {holder['since']}"
    return (
        f"{folder} is in use: {who}, and two jobs would spoil each other's checkpoints. Wait for "
        f"its end, or train elsewhere with --suffix or --runs"
    )


def _if_alone(comm: Collectives) -> str:
    if comm.world_size > 1:
        return ""
    return (
        ". This job has one rank: if both were to be ranks of one job, they have not found each "
        "other; start them with horovodrun, mpirun, torchrun or launch/train.sh"
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "namespace": os.readlink("/proc/self/ns/pid"),  # each container numbers its own processes
        "started": _started(os.getpid()),
    }


def _started(pid: Any) -> str | None:
    """Return when a process of this machine started, in clock ticks; None if there is none."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_bytes()  # a name in it may end within a letter
        return stat.rpartition(b")")[2].split()[19].decode()
    return None


def _read(file: int) -> dict[str, Any]:
    """Return what the holder wrote about itself; {} if it has not written yet."""
    with contextlib.suppress(ValueError):
        holder = json.loads(os.pread(file, 4096, 0))
        if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys():
            return holder
    return {}
