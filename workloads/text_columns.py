"""Batches of a text that is cut into columns, and how an epoch's rest is cut anew for other ranks.

Shapes: N words of a text, C columns of L words over all ranks, B columns of a rank, T rows of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Pieces = list[tuple[int, int]]
"""Of a text: (first input, the one after the last). Each input's target is the word after it."""


class ColumnBatches:
    """Batches of T rows each of a rank's B columns.

    A position is {}, or {"pieces": (K, 2), "counts": (B,)}: the pieces of the text of which this
    rank's columns are made, and how many belong to each.
    Args:
        words: (N,) int32. columns: number of columns C -> inputs (C, L) and targets (C, L).
        limit: the most samples of an epoch, over all ranks; a sample is T words of a column.
    """

    def __init__(
        self,
        words: Tensor,
        columns: Callable[[int], tuple[Tensor, Tensor]],
        *,
        bptt: int,
        batch_size: int,
        rank: int,
        world_size: int,
        limit: int | None,
        seed: int,
    ) -> None:
        self._words, self._columns, self._limit, self._seed = words, columns, limit, seed
        self._bptt, self._rank, self._world_size = bptt, rank, world_size
        self.samples_per_batch = batch_size
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        self._inputs, self._targets = (part[mine] for part in columns(batch_size * world_size))
        self.num_batches = self._batches_of(self._inputs.shape[1], world_size)
        self._pieces: list[Pieces] | None = None

    def _batches_of(self, length: int, world_size: int) -> int:
        most = length // self._bptt
        if self._limit is None:
            return most
        return min(most, self._limit // (self.samples_per_batch * world_size))

    def start(
        self, epoch: int, first: int, position: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from a position to its end."""
        num_left = self.num_left(first, position)
        self._pieces = _unpacked(position) if position else None
        if self._pieces is None:
            row = self._first_row(epoch, self._inputs.shape[1], self._world_size)
            row += first * self._bptt
            return self._batches(self._inputs[:, row:], self._targets[:, row:], num_left)
        return self._batches(self._joined(0), self._joined(1), num_left)

    def _batches(
        self, inputs: Tensor, targets: Tensor, number: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for row in range(0, number * self._bptt, self._bptt):
            if self._pieces is not None:
                self._pieces = [_after(pieces, self._bptt) for pieces in self._pieces]
            yield tuple(
                columns[:, row : row + self._bptt].t().long().contiguous()
                for columns in (inputs, targets)
            )

    def _joined(self, shift: int) -> Tensor:
        """Return the columns (B, L) that are made of pieces; shift 0: inputs, 1: targets."""
        nothing = self._words[:0]
        return torch.stack(
            [
                torch.cat([nothing, *(self._words[b + shift : e + shift] for b, e in pieces)])
                for pieces in self._pieces
            ]
        )

    def num_left(self, first: int, position: Mapping[str, Any]) -> int:
        if not position:
            return self.num_batches - first
        return sum(end - begin for begin, end in _unpacked(position)[0]) // self._bptt

    def position(self) -> dict[str, Any]:
        """Return {} where the epoch and the number of a batch say where it begins."""
        if self._pieces is None:
            return {}
        flat = [piece for pieces in self._pieces for piece in pieces]
        return {
            "pieces": torch.tensor(flat, dtype=torch.int64).view(-1, 2),
            "counts": torch.tensor([len(pieces) for pieces in self._pieces]),
        }

    def take_over(
        self, epoch: int, first: int, positions: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return this rank's position: what is left of all columns, end to end, is cut anew."""
        size = self.samples_per_batch
        left: Pieces = []
        for rank, position in enumerate(positions):
            if not position:
                left += self._left_of_whole(epoch, first, rank, len(positions))
            for pieces in _unpacked(position) if position else ():
                left += pieces
        total = sum(end - begin for begin, end in left)
        length = total // (size * self._world_size * self._bptt) * self._bptt
        self._pieces = []
        for column in range(self._rank * size, (self._rank + 1) * size):
            self._pieces.append(_cut(left, column * length, (column + 1) * length))
        return self.position()

    def _left_of_whole(self, epoch: int, first: int, rank: int, world_size: int) -> Pieces:
        """Return what follows batch first - 1 of the columns that a rank of so many began with."""
        size = self.samples_per_batch
        length = self._columns(size * world_size)[0].shape[1]
        row = self._first_row(epoch, length, world_size)
        end = row + self._batches_of(length, world_size) * self._bptt
        begin = row + first * self._bptt
        columns = range(rank * size, (rank + 1) * size)
        return [(column * length + begin, column * length + end) for column in columns]

    def _first_row(self, epoch: int, length: int, world_size: int) -> int:
        """Return how many rows an epoch leaves out at the beginning of the columns."""
        left_out = length - self._batches_of(length, world_size) * self._bptt
        return int(torch.randint(left_out + 1, (), generator=seeded(self._seed, epoch)))


def _unpacked(position: Mapping[str, Any]) -> list[Pieces]:
    parts = position["pieces"].split(position["counts"].tolist())
    return [[(begin, end) for begin, end in part.tolist()] for part in parts]


def _after(pieces: Pieces, num_words: int) -> Pieces:
    """Return the pieces without their first words."""
    return _cut(pieces, num_words, sum(end - begin for begin, end in pieces))


def _cut(pieces: Pieces, first: int, last: int) -> Pieces:
    """Return what lies from `first` to before `last` of pieces laid end to end."""
    found, at = [], 0
    for begin, end in pieces:
        inner = max(begin, begin + first - at), min(end, begin + last - at)
        if inner[0] < inner[1]:
            found.append(inner)
        at += end - begin
    return found


def seeded(seed: int, epoch: int) -> torch.Generator:
    """Return a generator whose numbers depend on seed and epoch alone."""
    return torch.Generator().manual_seed(hash((seed, epoch)) & 0x7FFFFFFFFFFFFFFF)
