"""Several workers as threads of one process: Horovod's calls, for tests and simulation.

Refuses what Horovod refuses. A worker that fails, or waits for a call that others do not make,
ends them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Group, Handle, Names
from dgc.comm.pieces import check_sendable


class _LocalGroup:
    """One worker's asynchronous collectives among some of the workers."""

    def __init__(self, world: _LocalWorld, members: Sequence[int], worker: int) -> None:
        self._world, self._members = world, tuple(members)
        self.rank, self.world_size = self._members.index(worker), len(members)
        self._num_calls: dict[str, int] = {}

    def _start(self, value: Any, name: str) -> _Post:
        number = self._num_calls[name] = self._num_calls.get(name, 0) + 1
        key = f"{self._members}:{name}:{number}"
        return self._world.post(key, self._members, self.rank, value)

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        values = self._start(tensor.clone(), name)
        return _LocalHandle(values, lambda parts: tensor.copy_(_sum_in_order(parts)))

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        return _LocalHandle(self._start(tensor.clone(), name), torch.cat)

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        values = self._start(tensor.clone(), name)
        return _LocalHandle(values, lambda parts: _sum_in_order([p[self.rank] for p in parts]))

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Handle:
        for part in parts:
            check_sendable(part, name)
            if largest_bytes is not None and part.nbytes > largest_bytes:
                raise ValueError(
                    f"a part of {name} has {part.nbytes} bytes; promised: at most {largest_bytes}"
                )
        values = self._start([part.clone() for part in parts], name)
        return _LocalHandle(values, lambda rows: [row[self.rank].clone() for row in rows])


class LocalComm(_LocalGroup, Names):
    """One of several workers that are threads of one process: for tests and simulation.

    Made by `run_local`. Sums go in rank order, so results do not depend on who comes first.
    """

    can_split = True

    def __init__(self, world: _LocalWorld, rank: int) -> None:
        Names.__init__(self)
        super().__init__(world, range(world.size), rank)
        self.local_rank = rank % world.ranks_per_node
        self.local_size = world.ranks_per_node

    def nodes(self) -> list[int]:
        return [rank // self.local_size for rank in range(self.world_size)]

    def split(self, groups: Sequence[Sequence[int]]) -> Group:
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return _LocalGroup(self._world, mine, self.rank)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        tensor.copy_(self._start(tensor.clone(), name).wait()[0])

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        return list(self._start(value, "object").wait())

    def barrier(self, name: str = "barrier") -> None:
        self._start(None, name).wait()

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self._world.fail(RuntimeError(f"worker {self.rank} ends the job"))


class _LocalHandle:
    def __init__(self, post: _Post, finish: Callable[[list[Any]], Any]) -> None:
        self._post, self._finish = post, finish
        self.poll = post.is_complete

    def wait(self) -> Any:
        return self._finish(self._post.wait())


def _sum_in_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class _LocalWorld:
    """Where the threads of `run_local` leave their values for one another."""

    def __init__(self, size: int, ranks_per_node: int) -> None:
        self.size, self.ranks_per_node = size, ranks_per_node
        self.changed = threading.Condition()
        self.posts: dict[str, _Post] = {}
        self.failure: BaseException | None = None

    def post(self, key: str, members: tuple[int, ...], rank: int, value: Any) -> _Post:
        with self.changed:
            post = self.posts.setdefault(key, _Post(self, key, members))
            post.values[rank] = value
            self.changed.notify_all()
            return post

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


class _Post:
    """The values of one collective, by rank among its members."""

    def __init__(self, world: _LocalWorld, key: str, members: tuple[int, ...]) -> None:
        self._world, self._key, self._members = world, key, members
        self.values: dict[int, Any] = {}
        self._num_read = 0

    def is_complete(self) -> bool:
        return len(self.values) == len(self._members)

    def wait(self) -> list[Any]:
        world = self._world
        with world.changed:
            complete = world.changed.wait_for(
                lambda: world.failure or self.is_complete(), timeout=120
            )
            if world.failure:
                raise RuntimeError("another worker failed") from world.failure
            if not complete:
                ranks = [self._members[rank] for rank in sorted(self.values)]
                raise RuntimeError(f"only ranks {ranks} called {self._key} in 120 s")
            self._num_read += 1
            if self._num_read == len(self._members):
                del world.posts[self._key]
            return [self.values[rank] for rank in range(len(self._members))]


def run_local(
    num_workers: int, work: Callable[[LocalComm], Any], ranks_per_node: int | None = None
) -> list[Any]:
    """Run `work(comm)` in `num_workers` threads and return their results in rank order.

    ranks_per_node: as if these many were on each node; None: all on one.
    Raises: what the first failing worker raised.
    """
    world = _LocalWorld(num_workers, ranks_per_node or num_workers)
    results: list[Any] = [None] * num_workers

    def run(rank: int) -> None:
        try:
            results[rank] = work(LocalComm(world, rank))
        except BaseException as error:
            world.fail(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure:
        raise world.failure
    return results
