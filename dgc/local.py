"""Several workers as threads of one process: Horovod's calls, for tests and simulation.

Refuses what Horovod refuses. A worker that fails, or waits for a call that others do not make,
ends them all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgc.comm import Handle, Names, check_sendable


class LocalComm(Names):
    """One of several workers that are threads of one process: for tests and simulation.

    Made by `run_local`. Sums go in rank order, so results do not depend on who comes first.
    """

    def __init__(self, world: _LocalWorld, rank: int) -> None:
        super().__init__()
        self._world, self.rank, self.world_size = world, rank, world.size
        self.local_rank, self.local_size = rank, world.size
        self._num_calls = 0

    def _start(self, value: Any, name: str) -> Callable[[], list[Any]]:
        self._num_calls += 1
        return self._world.post(f"{self._num_calls}:{name}", self.rank, value)

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        values = self._start(tensor.clone(), name)
        return _LocalHandle(lambda: tensor.copy_(_sum_in_order(values())))

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)
        values = self._start(tensor.clone(), name)
        return _LocalHandle(lambda: torch.cat(values()))

    def broadcast(self, tensor: Tensor, name: str) -> None:
        tensor.copy_(self._start(tensor.clone(), name)()[0])

    def broadcast_object(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        return list(self._start(value, "object")())

    def barrier(self, name: str = "barrier") -> None:
        self._start(None, name)()

    def close(self) -> None:
        pass


class _LocalHandle:
    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self.wait = wait


def _sum_in_order(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


class _LocalWorld:
    """Where the threads of `run_local` leave their values for one another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._posts: dict[str, dict[int, Any]] = {}
        self._num_read: dict[str, int] = {}
        self._failure: BaseException | None = None

    def post(self, key: str, rank: int, value: Any) -> Callable[[], list[Any]]:
        with self._changed:
            self._posts.setdefault(key, {})[rank] = value
            self._changed.notify_all()
        return lambda: self._collect(key)

    def _collect(self, key: str) -> list[Any]:
        with self._changed:
            complete = self._changed.wait_for(
                lambda: self._failure or len(self._posts[key]) == self.size, timeout=120
            )
            if self._failure:
                raise RuntimeError("another worker failed") from self._failure
            if not complete:
                ranks = sorted(self._posts[key])
                raise RuntimeError(f"only ranks {ranks} of {self.size} called {key} in 120 s")
            values = [self._posts[key][rank] for rank in range(self.size)]
            self._num_read[key] = self._num_read.get(key, 0) + 1
            if self._num_read[key] == self.size:
                del self._posts[key], self._num_read[key]
            return values

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def run_local(num_workers: int, work: Callable[[LocalComm], Any]) -> list[Any]:
    """Run `work(comm)` in `num_workers` threads and return their results in rank order.

    Raises: what the first failing worker raised.
    """
    world = _LocalWorld(num_workers)
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
    if world._failure:
        raise world._failure
    return results
