"""What the ranks say to each other: the few collectives that everything here is made of.

Owns: the protocols that horovod/, torch_distributed/ and local.py implement. All of them refuse
bfloat16 (Horovod has no such collective) and empty tensors (some back ends hang on them), but in
`broadcast` and in objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Handle(Protocol):
    """A collective under way. Ranks may start and await their collectives in different orders."""

    def wait(self) -> Any: ...

    def poll(self) -> bool:
        """Tell whether `wait` would return at once."""


class Arrived:
    """The handle of a collective whose result is there."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def poll(self) -> bool:
        return True

    def wait(self) -> Any:
        return self._result


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
