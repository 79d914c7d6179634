"""The asynchronous collectives of some ranks over messages that are met by name.

Sums are added up in rank order, so they are the same on all ranks, in every run, and as those of
the simulated workers of local.py. Tensors of a GPU go by NCCL (ordered_group.py) where each rank
has a GPU of its own, else through the host's memory.
Shapes: P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.comm.pieces import check_sendable
from dgc.comm.torch_distributed.mail import Mail, Post
from dgc.comm.torch_distributed.ordered_group import OrderedGroup

SMALL_BYTES = 2**15  # of a tensor that every rank sums for itself: one message's way, not two


class MailHandle:
    """A collective under way. keys: of its messages, the last ones last."""

    def __init__(
        self, mail: Mail, post: Post, keys: Sequence[str], name: str,
        finish: Callable[[dict[int, Tensor]], Any],
    ) -> None:  # fmt: skip
        self._mail, self._post, self._keys, self.name = mail, post, keys, name
        self._finish, self._is_done, self._result = finish, False, None

    def poll(self) -> bool:
        return self._is_done or self._mail.poll(self._post)

    def wait(self) -> Any:
        if not self._is_done:
            values = self._mail.wait(self._post, self._keys[-1], self.name)
            for key in self._keys:
                self._mail.finish_sending(key)
            self._result, self._is_done = self._finish(values), True
        return self._result


class TorchGroup:
    """One rank's asynchronous collectives among some ranks; members: by their number in the job.

    on_gpus: the same ranks' collectives for tensors of a GPU.
    """

    def __init__(
        self, mail: Mail, members: Sequence[int], on_gpus: OrderedGroup | None = None
    ) -> None:
        self._on_gpus = on_gpus
        self._mail, self._members = mail, tuple(members)
        self.rank, self.world_size = self._members.index(mail.rank), len(members)
        self._others = [m for m in self._members if m != mail.rank]
        self._num_calls: dict[str, int] = {}

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle:
        if tensor.is_cuda and self._on_gpus is not None:
            return self._on_gpus.all_reduce_async(tensor, name)
        check_sendable(tensor, name)
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        is_own = flat.data_ptr() == tensor.data_ptr()
        start = self._sum_all if flat.nbytes <= SMALL_BYTES else self._sum_parts
        return start(flat, name, lambda: tensor if is_own else _copied(tensor, flat))

    def all_gather_async(self, tensor: Tensor, name: str) -> Handle:
        if tensor.is_cuda and self._on_gpus is not None:
            return self._on_gpus.all_gather_async(tensor, name)
        check_sendable(tensor, name)
        own = tensor.detach().to("cpu")

        def join(values: dict[int, Tensor]) -> Tensor:
            return torch.cat([values[m] for m in self._members]).to(tensor.device)

        return self._exchange([own] * self.world_size, name, join)

    def reduce_scatter_async(self, tensor: Tensor, name: str) -> Handle:
        if tensor.is_cuda and self._on_gpus is not None:
            return self._on_gpus.reduce_scatter_async(tensor, name)
        check_sendable(tensor, name)
        rows = tensor.detach().to("cpu").contiguous()

        def add_up(values: dict[int, Tensor]) -> Tensor:
            mine = values[self._mail.rank] = values[self._mail.rank].clone()
            return self._sum(values, name, mine.numel()).to(tensor.device)

        return self._exchange(list(rows.view(self.world_size, -1)), name, add_up)

    def all_to_all_async(
        self, parts: list[Tensor], name: str, largest_bytes: int | None = None
    ) -> Handle:
        if parts[0].is_cuda and self._on_gpus is not None:
            return self._on_gpus.all_to_all_async(parts, name, largest_bytes)
        for part in parts:
            check_sendable(part, name)
        home, own = parts[0].device, [part.detach().to("cpu") for part in parts]

        def collect(values: dict[int, Tensor]) -> list[Tensor]:
            values[self._mail.rank] = values[self._mail.rank].clone()
            return [values[m].to(home) for m in self._members]

        return self._exchange(own, name, collect)

    # ---- how -------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        """Return the name of a collective's messages, as all of its ranks know it."""
        number = self._num_calls[name] = self._num_calls.get(name, 0) + 1
        return f"{','.join(map(str, self._members))}:{name}:{number}"

    def _exchange(
        self, parts: Sequence[Tensor], name: str, finish: Callable[[dict[int, Tensor]], Any]
    ) -> MailHandle:
        """Send each rank its part."""
        key, mail = self._key(name), self._mail
        post = mail.expect(key, self._members, mine=parts[self.rank])
        for member, part in zip(self._members, parts, strict=True):
            if member != mail.rank:
                mail.send(member, key, part)
        return MailHandle(mail, post, [key], name, finish)

    def _sum_all(self, flat: Tensor, name: str, finish: Callable[[], Tensor]) -> MailHandle:
        def add_up(values: dict[int, Tensor]) -> Tensor:
            total = self._sum(values, name, flat.numel())
            if total is not flat:
                flat.copy_(total)
            return finish()

        return self._exchange([flat] * self.world_size, name, add_up)

    def _sum_parts(self, flat: Tensor, name: str, finish: Callable[[], Tensor]) -> MailHandle:
        """Each rank sums its part of the tensor when all have sent it, and sends the sum to all."""
        mail, key = self._mail, self._key(name)
        parts_key, sums_key = f"{key}.parts", f"{key}.sums"
        slots = dict(zip(self._members, flat.tensor_split(self.world_size), strict=True))
        mine = slots.pop(mail.rank)

        def pass_on(post: Post) -> None:
            total = self._sum(post.values, name, mine.numel())
            if total is not mine:
                mine.copy_(total)
            for member in self._others:
                mail.send(member, sums_key, mine)
            mail.add(sums_key, mine)

        parts = mail.expect(parts_key, self._members, then=pass_on)
        sums = mail.expect(sums_key, self._members, into=slots, after=parts)
        for member, part in slots.items():
            mail.send(member, parts_key, part)
        mail.add(parts_key, mine)
        return MailHandle(mail, sums, [parts_key, sums_key], name, lambda _: finish())

    def _sum(self, values: dict[int, Tensor], name: str, numel: int) -> Tensor:
        """Add up in rank order, in the memory of the first."""
        own = values[self._mail.rank].dtype
        for member, value in values.items():
            if (value.numel(), value.dtype) != (numel, own):
                raise ValueError(
                    f"rank {member} gave {value.numel()} elements of {value.dtype} to the sum "
                    f"{name!r}, and rank {self._mail.rank} {numel} of {own}"
                )
        total = values[self._members[0]]
        for member in self._members[1:]:
            total += values[member]
        return total


def _copied(tensor: Tensor, flat: Tensor) -> Tensor:
    tensor.detach().copy_(flat.view_as(tensor))
    return tensor
