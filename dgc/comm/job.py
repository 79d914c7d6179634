"""A job from its start to its end, whoever started it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dgc.comm.ending import ended_together
from dgc.comm.horovod.comm import HorovodComm
from dgc.comm.interface import Comm
from dgc.comm.launched import kind_of_comm
from dgc.comm.torch_distributed.comm import TorchComm

COMMS = {"horovod": HorovodComm, "torch": TorchComm}


@contextlib.contextmanager
def job(kind: str | None = None) -> Iterator[Comm]:
    """Join the job; if this rank fails, print why and end the job on every rank.

    kind: "horovod" or "torch"; None: torch where torchrun started this process, else Horovod.
    """
    with ended_together(COMMS[kind or kind_of_comm()]()) as comm:
        yield comm
