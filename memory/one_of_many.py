"""One rank of a job without the others: each collective takes the memory that it would, here.

What the others would send is what this rank sends, so it also runs on real tensors. As Horovod
does: sums are in place, what is gathered is a tensor of its own. What Horovod, MPI and NCCL keep
for themselves outside torch's allocator is in none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm import Names
from dgc.comm.pieces import check_sendable


class _Group:
    """Collectives among `world_size` ranks of which this is the first."""

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size

    def all_reduce_async(self, tensor: Tensor, name: str) -> _Arrived:
        check_sendable(tensor, name)
        return _Arrived(tensor.mul_(self.world_size) if self.world_size > 1 else tensor)

    def all_gather_async(self, tensor: Tensor, name: str) -> _Arrived:
        check_sendable(tensor, name)
        return _Arrived(torch.cat([tensor] * self.world_size))

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> _Arrived:
        check_sendable(tensor, name)
        return _Arrived(tensor[0] * self.world_size)

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> _Arrived:
        return _Arrived([parts[0].clone() for _ in range(self.world_size)])


class OneOfMany(_Group, Names):
    """Rank 0 of `world_size`, with `ranks_per_node` on each node."""

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


class _Arrived:
    """A collective that is done."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def poll(self) -> bool:
        return True

    def wait(self) -> Any:
        return self._result
