"""A comm for one rank of a job without the other ranks, whose collectives allocate as real ones do.

It takes what this rank sends for what the other ranks would send, so it also runs on real tensors.
As with Horovod, sums are made in place, and a gather returns a new tensor. The buffers that
Horovod, MPI and NCCL keep outside torch's allocator are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Arrived, Names
from dgc.comm.pieces import check_sendable


class _Group:
    """The collectives of a group of `world_size` ranks, of which this is rank 0."""

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size

    def all_reduce_async(self, tensor: Tensor, name: str) -> Arrived:
        check_sendable(tensor, name)
        return Arrived(tensor.mul_(self.world_size) if self.world_size > 1 else tensor)

    def all_gather_async(self, tensor: Tensor, name: str) -> Arrived:
        check_sendable(tensor, name)
        return Arrived(torch.cat([tensor] * self.world_size))

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Arrived:
        check_sendable(tensor, name)
        return Arrived(tensor[0] * self.world_size)

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Arrived:
        return Arrived([parts[0].clone() for _ in range(self.world_size)])


class OneOfMany(_Group, Names):
    """The comm of rank 0 of `world_size` ranks, with `ranks_per_node` on each node."""

    can_split = True

    def __init__(self, world_size: int, ranks_per_node: int | None = None) -> None:
        Names.__init__(self)
        super().__init__(world_size)
        self.local_rank, self.local_size = 0, ranks_per_node or 1

    def nodes(self) -> list[int]:
        return [rank // self.local_size for rank in range(self.world_size)]

    def split(self, groups: Sequence[Sequence[int]]) -> _Group:
        return _Group(len(next(ranks for ranks in groups if 0 in ranks)))

    def broadcast(self, tensor: Tensor, name: str) -> None:
        pass

    def broadcast_object(self, value: Any) -> Any:
        return value

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def barrier(self, name: str = "barrier") -> None:
        pass

    def close(self) -> None:
        pass
