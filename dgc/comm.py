"""What the ranks say to each other: a protocol of few calls, and Horovod behind it.

Owns: every collective of training, and the end of the job when a rank fails. This is the one file
that imports horovod and mpi4py, and it does so when a job starts, not when it is imported. Several
HorovodComms of one process are one: see life.py. Any of them sends what is too large for a call of
Horovod's in several: see pieces.py.
Refuses: bfloat16 (Horovod has no such collective) and empty tensors (some back ends hang on them),
but in `broadcast` and in objects.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dgc import life, pieces
from dgc.horovod_group import HorovodGroup, HorovodHandle
from dgc.launched import LaunchError, refuse_loners
from dgc.objects import Broadcasts
from dgc.pieces import Handle


class Names:
    """Names that every rank makes alike, if all ask in the same order."""

    def __init__(self) -> None:
        self._num_made: dict[str, int] = {}

    def unique_name(self, kind: str) -> str:
        number = self._num_made.get(kind, 0)
        self._num_made[kind] = number + 1
        return f"{kind}{number}"


class Group(Protocol):
    """The asynchronous collectives of one rank among some ranks, or among all.

    Collectives of one name meet; while one is under way its name may not be used again.
    """

    rank: int
    world_size: int

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        """Sum over ranks, in place; `wait` returns `tensor`. Equal on all ranks, to the bit."""

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Join (n_r,) tensors in rank order; n_r may differ between ranks, and is at least 1."""

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        """Sum (P, m) tensors over the P ranks; `wait` returns row `rank` of the sum, (m,)."""

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Handle:
        """Send each rank its part (n,), n at least 1; `wait` returns a part from each rank.

        largest_bytes: no rank's part for any other is larger, as all ranks know alike. Where it is
        not known, or so much that one call might not carry the parts, sizes are exchanged first.
        """


class Comm(Group, Protocol):
    """All of a job's ranks. They ask for what is not asynchronous in the same order."""

    local_rank: int
    local_size: int

    can_split: bool
    """Whether `split` may be called."""

    def nodes(self) -> list[int]:
        """Return the number of the node of each rank. Collective."""

    def split(self, groups: Sequence[Sequence[int]]) -> Group:
        """Return the group that this rank is in; groups: disjoint lists of ranks. Collective."""

    def broadcast(self, tensor: Tensor, name: str) -> None:
        """Overwrite `tensor`, of any dtype, size and strides, with rank 0's, in place."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value: to others a copy, to rank 0 what it gave.

        Tensors travel one by one, in place. Beside the value itself a rank needs memory for one
        piece (pieces.PIECE_BYTES) where strides have gaps, and three times what is in the
        value without being a tensor.
        """

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return a copy of every rank's value, in rank order. Memory as in `broadcast_object`."""

    def barrier(self, name: str = "barrier") -> None:
        """Return when every rank has called it. `name` is for the message if one does not."""

    def unique_name(self, kind: str) -> str:
        """Return `kind` and a number: the same on all ranks, if all ask in the same order."""

    def close(self) -> None:
        """Leave the job in good order."""

    def abort(self) -> None:
        """End the job on every rank with exit status 1. Does not return."""


AnyComm = TypeVar("AnyComm", bound=Comm)

_names = Names()  # of all HorovodComms here: Horovod knows a collective by its name


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
        groups = [sorted(ranks) for ranks in groups]  # as Horovod numbers them
        process_sets = [life.process_set(self._hvd, ranks) for ranks in groups]  # all make all
        mine = next(number for number, ranks in enumerate(groups) if self.rank in ranks)
        place, size = groups[mine].index(self.rank), len(groups[mine])
        return HorovodGroup(self._hvd, process_sets[mine], place, size)

    def _broadcast(self, tensor: Tensor, name: str, root: int) -> None:
        """Overwrite `tensor` with a rank's: as bytes, so that bfloat16 goes too, in their place."""
        for part in pieces.parts_of(tensor.detach()) if tensor.numel() else ():
            wire, is_own = pieces.as_bytes(part)
            handle = self._hvd.broadcast_async_(wire, root_rank=root, name=name)
            HorovodHandle(self._hvd, handle, name).wait()
            if self.rank != root:
                pieces.take_in(part, wire, is_own)

    def barrier(self, name: str = "barrier") -> None:
        here = torch.zeros(1, dtype=torch.float32, device="cpu")
        self.all_reduce_async(here, name).wait()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            if self._hvd.is_initialized():
                self.barrier("close")  # who ends Horovod ends it for those who still talk to others
            life.leave(self._hvd)

    def abort(self) -> None:
        """End the job on every rank with exit status 1. Does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.controller == "mpi":
            import mpi4py

            mpi4py.rc.initialize = mpi4py.rc.finalize = False  # Horovod did and will do both
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(1)
        os._exit(1)  # without MPI, horovodrun ends the others when it sees one exit with non-zero


def horovod_job() -> contextlib.AbstractContextManager[HorovodComm]:
    """Join a job of Horovod's; if this rank fails, print why and end the job on every rank."""
    return ended_together(HorovodComm())


@contextlib.contextmanager
def ended_together(comm: AnyComm) -> Iterator[AnyComm]:
    """Close the comm at the end; if this rank fails, print why and end the job on every rank."""
    leaving: SystemExit | None = None
    try:
        try:
            yield comm
        except SystemExit as error:
            if error.code not in (0, None):
                raise
            leaving = error
        comm.close()
    except BaseException as error:
        _report_failure(error, comm.rank)
        comm.abort()
    if leaving is not None:
        raise leaving


def _report_failure(error: BaseException, rank: int) -> None:
    """Print the message of a mistake, or the whole trace of anything else, with the rank."""
    if isinstance(error, SystemExit):
        text = f"{error.code}\n"
    else:
        text = "".join(traceback.format_exception(error))
    print(f"rank {rank} failed and ends the job:\n{text}", file=sys.stderr, end="", flush=True)
