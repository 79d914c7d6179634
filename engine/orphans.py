"""Processes that end with the one that they serve, however that one ends.

A rank serves its launcher, a fork server its rank, a loader process its fork server.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

_PR_SET_PDEATHSIG = 1
_LAUNCHED = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "HOROVOD_RANK", "TORCHELASTIC_RUN_ID")
_LOOK_EVERY_S = 1.0


def end_with_launcher() -> None:
    """Let this process end within seconds of its launcher, if one has started it.

    Asks who the parent is, now and then: the kernel's own signal (see `end_with_parent`) comes also
    when the thread of the parent that made this process ends, and mpirun starts many in threads.
    """
    if os.environ.keys().isdisjoint(_LAUNCHED):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)
