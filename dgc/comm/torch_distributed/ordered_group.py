"""NCCL's collectives, which torch matches by order, for ranks that start them in any order.

Rank 0 hears from each member of a group what it wants to start, and how large its part is. When all
have said so, each is told its turn, and everyone's sizes. A rank starts all its collectives in the
order of its turns, whatever the group: any two ranks start what they share in one order, and no two
communicators wait for each other.
NCCL has been run with one GPU only. The tests run this over gloo.
Shapes: P ranks.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.comm.pieces import check_sendable, wait_until
from dgc.comm.torch_distributed.mail import Mail

Start = Callable[[Tensor], tuple[Any, Callable[[], Any]]]  # sizes (P, n) -> torch's work, finish


class Turns:
    """Whose turn it is. There is one of it for all groups of a rank."""

    def __init__(self, mail: Mail) -> None:
        self._mail, self._lock = mail, threading.RLock()
        self._wanted: dict[str, dict[int, Tensor]] = {}  # on rank 0: sizes by member
        self._num_given: dict[int, int] = {}
        self._waiting: dict[str, Callable[[Tensor], None]] = {}
        self._ready: list[tuple[int, str, Tensor]] = []
        self._num_started = 0
        mail.listeners["want:"], mail.listeners["turn:"] = self._hear_wish, self._hear_turn

    def ask(self, key: str, sizes: list[int], start: Callable[[Tensor], None]) -> None:
        """Have start(sizes) called in this rank's turn. key: begins with the group's members."""
        self._waiting[key] = start
        self._mail.tell(0, f"want:{key}", torch.tensor(sizes, dtype=torch.int64, device="cpu"))

    def _hear_wish(self, key: str, member: int, sizes: Tensor) -> None:
        with self._lock:
            members = [int(m) for m in key.partition(":")[0].split(",")]
            wanted = self._wanted.setdefault(key, {})
            wanted[member] = sizes
            if len(wanted) < len(members):
                return
            del self._wanted[key]
            everyones = torch.cat([wanted[m] for m in members])
            for m in sorted(members, reverse=True):  # 0 last: a start may wait for the others
                turn = self._num_given[m] = self._num_given.get(m, 0) + 1
                self._mail.tell(m, f"turn:{key}", torch.cat([sizes.new_tensor([turn]), everyones]))

    def _hear_turn(self, key: str, _: int, message: Tensor) -> None:
        with self._lock:
            heapq.heappush(self._ready, (int(message[0]), key, message[1:]))
            while self._ready and self._ready[0][0] == self._num_started + 1:
                _, key, sizes = heapq.heappop(self._ready)
                self._num_started += 1
                self._waiting.pop(key)(sizes)


class OrderedHandle:
    def __init__(self, mail: Mail, members: Sequence[int], name: str) -> None:
        self._mail, self._members, self.name = mail, members, name
        self._started: tuple[Any, Callable[[], Any]] | None = None
        self._failure: Exception | None = None

    def start(self, start: Start, sizes: Tensor, stream: Any) -> None:
        try:
            with torch.cuda.stream(stream):
                self._started = start(sizes.view(len(self._members), -1))
        except Exception as error:
            self._failure = error

    def poll(self) -> bool:
        if self._failure is not None:
            raise self._failure
        if self._started is None:
            self._mail.refuse_gone(self._members, self.name)
        return self._started is not None and self._started[0].is_completed()

    def wait(self) -> Any:
        wait_until(self.poll, self.name)
        work, finish = self._started
        work.wait()
        return finish()


class OrderedGroup:
    """The asynchronous collectives of a process group, of any backend."""

    def __init__(self, turns: Turns, mail: Mail, group: Any, members: Sequence[int]) -> None:
        self._turns, self._mail, self._group, self._members = turns, mail, group, tuple(members)
        self.rank, self.world_size = self._members.index(mail.rank), len(members)
        self._num_calls: dict[str, int] = {}

    def _ask(self, name: str, like: Tensor, sizes: list[int], start: Start) -> Handle:
        number = self._num_calls[name] = self._num_calls.get(name, 0) + 1
        handle = OrderedHandle(self._mail, self._members, name)
        stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
        key = f"{','.join(map(str, self._members))}:{name}:{number}"
        self._turns.ask(key, sizes, lambda everyones: handle.start(start, everyones, stream))
        return handle

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)

        def start(_: Tensor) -> tuple[Any, Callable[[], Tensor]]:
            return dist.all_reduce(tensor, group=self._group, async_op=True), lambda: tensor

        return self._ask(name, tensor, [tensor.numel()], start)

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)

        def start(sizes: Tensor) -> tuple[Any, Callable[[], Tensor]]:
            counts, most = sizes[:, 0].tolist(), int(sizes.max())
            own = tensor.new_zeros(most)  # a gather's parts are of one size
            own[: len(tensor)] = tensor
            whole = tensor.new_empty(self.world_size * most)
            work = dist.all_gather_single(whole, own, group=self._group, async_op=True)
            return work, lambda: torch.cat(
                [part[:n] for part, n in zip(whole.split(most), counts, strict=True)]
            )

        return self._ask(name, tensor, [tensor.numel()], start)

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        check_sendable(tensor, name)

        def start(_: Tensor) -> tuple[Any, Callable[[], Tensor]]:
            rows = tensor.contiguous().view(-1)
            mine = tensor.new_empty(tensor.numel() // self.world_size)
            work = dist.reduce_scatter_single(mine, rows, group=self._group, async_op=True)
            return work, lambda: mine

        return self._ask(name, tensor, [tensor.numel()], start)

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Handle:
        for part in parts:
            check_sendable(part, name)
        counts = [part.numel() for part in parts]

        def start(sizes: Tensor) -> tuple[Any, Callable[[], list[Tensor]]]:
            received = sizes[:, self.rank].tolist()
            whole = parts[0].new_empty(sum(received))
            work = dist.all_to_all_single(
                whole, torch.cat(parts), received, counts, group=self._group, async_op=True
            )
            return work, lambda: list(whole.split(received))

        return self._ask(name, parts[0], counts, start)
