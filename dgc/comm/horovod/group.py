"""The asynchronous collectives of one of Horovod's process sets, whatever their size.

Each is handed `horovod.torch`; nothing here imports it. Tensors of a GPU go by NCCL where Horovod
has it and each rank has a GPU of its own; else through the host's memory, by copies made here: a
Horovod that was built without CUDA would send what its own copy has not brought yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgc.comm import pieces
from dgc.comm.horovod.patience import Patience
from dgc.comm.interface import Handle
from dgc.comm.pieces import RollCall, Stepwise, check_sendable, wait_until


class HorovodHandle:
    def __init__(
        self,
        hvd: Any,
        handle: int,
        name: str,
        finish: Callable[[Any], Any] | None = None,
        roll_call: RollCall | None = None,
    ) -> None:
        self._hvd, self._handle, self.name, self._finish = hvd, handle, name, finish
        self.roll_call = roll_call

    def poll(self) -> bool:
        return self._hvd.poll(self._handle)

    def wait(self) -> Any:
        wait_until(self.poll, self.name, self.roll_call)
        result = self._hvd.synchronize(self._handle)
        return result if self._finish is None else self._finish(result)


class FromHost:
    """The handle of a collective of copies. bring: takes its result to where it belongs."""

    def __init__(self, handle: Handle, bring: Callable[[Any], Any]) -> None:
        self._handle, self._bring = handle, bring

    def poll(self) -> bool:
        return self._handle.poll()

    def wait(self) -> Any:
        return self._bring(self._handle.wait())


class HorovodGroup:
    """The asynchronous collectives of one of Horovod's process sets.

    takes_gpus_tensors: whether Horovod is handed a GPU's tensors themselves.
    """

    def __init__(
        self,
        hvd: Any,
        process_set: Any,
        rank: int,
        world_size: int,
        patience: Patience | None = None,
        takes_gpus_tensors: bool = False,
    ) -> None:
        self._hvd, self._set, self.patience = hvd, process_set, patience
        self.rank, self.world_size = rank, world_size
        self._takes_gpus_tensors = takes_gpus_tensors

    def _goes_through_host(self, tensor: Tensor) -> bool:
        return tensor.device.type != "cpu" and not self._takes_gpus_tensors

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        if self._goes_through_host(tensor):
            handle = self.all_reduce_async(tensor.detach().to("cpu"), name)
            return FromHost(handle, lambda total: _copied(tensor, total))
        if pieces.fits(tensor.nbytes):
            return self._all_reduce(tensor, name)
        return Stepwise(pieces.all_reduce(self._all_reduce, tensor, name))

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        if self._goes_through_host(tensor):
            handle = self.all_gather_async(tensor.detach().to("cpu"), name)
            return FromHost(handle, lambda joined: joined.to(tensor.device))
        return Stepwise(pieces.all_gather(self._all_gather, tensor, name, self.world_size))

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        if self._goes_through_host(tensor):
            handle = self.reduce_scatter_async(tensor.detach().to("cpu"), name)
            return FromHost(handle, lambda row: row.to(tensor.device))
        if pieces.fits(tensor.nbytes):
            return self._reduce_scatter(tensor, name)
        return Stepwise(pieces.reduce_scatter(self._reduce_scatter, tensor, name))

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Handle:
        for part in parts:
            check_sendable(part, name)
        if self._goes_through_host(home := parts[0]):
            copies = [part.detach().to("cpu") for part in parts]
            handle = self.all_to_all_async(copies, name, largest_bytes)
            return FromHost(handle, lambda found: [part.to(home.device) for part in found])
        if largest_bytes is not None and pieces.fits(self.world_size * largest_bytes):
            return self._all_to_all(parts, name)
        return Stepwise(
            pieces.all_to_all(self._all_to_all, self._all_gather, parts, name, self.rank)
        )

    # ---- one call of Horovod's each --------------------------------------------------------------

    def _start(
        self,
        call: Callable[..., int],
        tensor: Tensor,
        name: str,
        finish: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> HorovodHandle:
        if self.patience is None:  # the ranks are only finding each other
            return HorovodHandle(self._hvd, call(tensor, name=name, **options), name, finish)
        with self.patience.starting(name):
            handle = call(tensor, name=name, **options)
        return HorovodHandle(self._hvd, handle, name, finish, self.patience.roll_call)

    def _all_reduce(self, tensor: Tensor, name: str) -> HorovodHandle:
        hvd = self._hvd
        return self._start(hvd.allreduce_async_, tensor, name, op=hvd.Sum, process_set=self._set)

    def _all_gather(self, tensor: Tensor, name: str) -> HorovodHandle:
        return self._start(self._hvd.allgather_async, tensor, name, process_set=self._set)

    def _reduce_scatter(self, tensor: Tensor, name: str) -> HorovodHandle:
        """Gloo's own, which Horovod would call, gives wrong sums and no error: a rank writes into
        what it is still sending, where its socket does not take all at once (jax-ml/jax #40830;
        here a tenth of the pieces of 64 MiB of two ranks). Rows travel instead, as many bytes.
        """
        hvd = self._hvd
        if hvd.gloo_enabled() and not tensor.is_cuda:
            return self._start(
                hvd.alltoall_async, tensor.reshape(-1), name,
                lambda found: found[0].view(tensor.shape).sum(0, dtype=tensor.dtype),
                process_set=self._set,
            )  # fmt: skip
        return self._start(
            hvd.reducescatter_async, tensor, name, lambda row: row.view(-1), op=hvd.Sum,
            process_set=self._set,
        )  # fmt: skip

    def _all_to_all(self, parts: list[Tensor], name: str) -> HorovodHandle:
        sizes = [part.numel() for part in parts]
        return self._start(
            self._hvd.alltoall_async, torch.cat(parts), name,
            lambda found: list(found[0].split(found[1].tolist())), process_set=self._set,
            splits=torch.tensor(sizes, dtype=torch.int32, device="cpu"),
        )  # fmt: skip


def _copied(tensor: Tensor, found: Tensor) -> Tensor:
    tensor.detach().copy_(found)
    return tensor
