"""How long a rank waits for the others in Horovod's calls, and what it says when that is over."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import socket
from collections.abc import Callable
from typing import Any

from dgc.comm.horovod import roll_call
from dgc.comm.pieces import STALL_LIMIT, stall_seconds
from parsimony_kernels.runtime.build import host_library

_log = logging.getLogger(__name__)


class Patience:
    """One rank's. Made by all ranks of a job. A collective.

    starts_may_block: Horovod was started with dynamic process sets. To start a collective then
        waits for the slowest rank's background thread, with the interpreter's lock held, so that
        no limit in Python is kept (Horovod 0.28.1, process_set.cc).
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        all_gather_object: Callable[[Any], list[Any]],
        starts_may_block: bool,
    ) -> None:
        self._rank, self._library = rank, None
        self.roll_call = roll_call.begin(rank, all_gather_object) if world_size > 1 else None
        if starts_may_block and world_size > 1:
            try:
                self._library = host_library()
            except RuntimeError as error:
                _log.warning("no limit holds while a collective starts: %s", error)
            else:
                self._library.parsimony_watch_begin.argtypes = [ctypes.c_double, ctypes.c_char_p]

    def starting(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a collective is started."""
        return contextlib.nullcontext() if self._library is None else self._watched(name)

    @contextlib.contextmanager
    def _watched(self, name: str) -> Any:
        limit = stall_seconds()
        if not limit:
            yield
            return
        message = (
            f"rank {self._rank} on {socket.gethostname()} failed and ends the job:\n"
            f"waited {limit:g} s for Horovod to start collective {name!r}: another rank's Horovod "
            f"does not answer; that rank is stopped or cut off. {STALL_LIMIT} sets the limit\n"
        )
        self._library.parsimony_watch_begin(limit, message.encode())
        try:
            yield
        finally:
            self._library.parsimony_watch_end()
