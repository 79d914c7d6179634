"""Horovod behind the Comm protocol.

Owns: every collective that Horovod carries, and the end of its job when a rank fails. Horovod and
mpi4py are imported here alone, and only when a job starts. Several HorovodComms of one process are
one: see life.py. Any of them sends what is too large for a call of Horovod's in several: see
dgc/comm/pieces.py.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.comm import pieces
from dgc.comm.ending import ended_together
from dgc.comm.horovod import life
from dgc.comm.horovod.group import HorovodGroup
from dgc.comm.interface import Group, Names
from dgc.comm.launched import LaunchError, refuse_loners
from dgc.comm.objects import Broadcasts

_names = Names()  # for all HorovodComms of this process: Horovod tells collectives apart by name


class HorovodComm(HorovodGroup, Broadcasts):
    """Horovod's collectives, under `horovodrun` (MPI or Gloo), `mpirun`, or alone.

    Begins Horovod if nobody has. Any number may be made, on all ranks in one order; `close` of the
    last one ends Horovod if one of them began it. While there is one, hvd.join() is refused.
    Raises: RuntimeError in a job of Horovod Elastic, without Horovod, and in one of several
        processes that finds itself alone.
    """

    def __init__(self) -> None:
        try:
            import horovod.torch as hvd
        except ModuleNotFoundError as error:
            raise LaunchError(
                f"{error}, so Horovod cannot be used. Start with torchrun, and use TorchComm "
                f"(train.py: --comm torch); or install Horovod with launch/setup.sh"
            ) from error
        life.enter(hvd)
        self._is_open = True
        super().__init__(hvd, hvd.global_process_set, hvd.rank(), hvd.size())
        refuse_loners(self.world_size, "Horovod")
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.patience = life.patience(hvd, self.all_gather_object)
        has_gpu = bool(hvd.nccl_built()) and torch.cuda.device_count() >= self.local_size
        self._takes_gpus_tensors = all(self.all_gather_object(has_gpu))

    @property
    def controller(self) -> str:
        """`mpi` or `gloo`: who carries Horovod's own messages."""
        return "mpi" if self._hvd.mpi_enabled() else "gloo"

    @property
    def can_split(self) -> bool:
        return life.can_split(self._hvd)

    def unique_name(self, kind: str) -> str:
        return _names.unique_name(kind)

    def nodes(self) -> list[int]:
        return self.all_gather_object(self._hvd.cross_rank())

    def split(self, groups: Sequence[Sequence[int]]) -> Group:
        # Horovod numbers the members of a set in ascending order.
        groups = [sorted(ranks) for ranks in groups]
        # Every rank must make every set.
        process_sets = [life.process_set(self._hvd, ranks) for ranks in groups]
        mine = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
        rank, size = groups[mine].index(self.rank), len(groups[mine])
        return HorovodGroup(
            self._hvd, process_sets[mine], rank, size, self.patience, self._takes_gpus_tensors
        )

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> None:
        """Overwrite `tensor` in place with a rank's. Bytes travel, so that bfloat16 can."""
        for part in pieces.parts_of(tensor.detach()) if tensor.numel() else ():
            goes_around = self._goes_through_host(part)
            wire, is_own = pieces.as_bytes(part.to("cpu") if goes_around else part)
            self._start(self._hvd.broadcast_async_, wire, name, root_rank=root).wait()
            if self.rank != root:
                pieces.take_in(part, wire, is_own and not goes_around)

    def barrier(self, name: str = "barrier") -> None:
        here = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.all_reduce_async(here, name).wait()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            if self._hvd.is_initialized():
                self.barrier("close")  # shutdown would interrupt ranks that still wait for others
            life.leave(self._hvd)

    def abort(self) -> None:
        """End the job on every rank with exit status 1. Does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.controller == "mpi":
            import mpi4py

            # Horovod initializes and finalizes MPI.
            mpi4py.rc.initialize = mpi4py.rc.finalize = False
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # without MPI, horovodrun ends the others when it sees one exit with non-zero


def horovod_job() -> contextlib.AbstractContextManager[HorovodComm]:
    """Join a job of Horovod's; if this rank fails, print why and end the job on every rank."""
    return ended_together(HorovodComm())
