"""Batches that are filled line by line from shards of text, as they are read; see text_stream.

Shapes: T rows of B columns of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads.text_columns import seeded
from workloads.text_files import Span, line_spans, open_text
from workloads.vocabulary import Vocabulary

_BUFFER_BYTES = 2**20

Reading = list[tuple[int, int, int]]
"""What a rank reads, in order: (number of the shard, first byte, the one after the last)."""


class StreamedBatches:
    """Batches of T rows of B columns, which are filled line by line from spans of the shards.

    Where each batch begins only reading tells, so a position says it whole:
    "place": which span of the rank's reading it is in; "offset": the byte of the shard's text at
    which the next line begins; "laps": how often all was read; "words", int32: the rest of all
    columns, one after the other; "lengths", (B,): how many words belong to each. Where other ranks
    began the epoch, also "reading", (K, 3): this rank's; "left": the batches to its end.

    Args: num_words: of all shards. limit: the most samples of an epoch over all ranks, each T words
        of a column; None: no limit.
    Cost: 3 million words a second on one core, if the shards are in the system's cache.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        vocabulary: Vocabulary,
        *,
        bptt: int,
        batch_size: int,
        rank: int,
        world_size: int,
        num_words: int,
        limit: int | None,
        seed: int,
    ) -> None:
        self._paths, self._vocabulary, self._bptt, self._seed = paths, vocabulary, bptt, seed
        self._rank, self._world_size = rank, world_size
        self._num_words, self._limit, self.samples_per_batch = num_words, limit, batch_size
        self.num_batches = self._batches_of(world_size)
        self._spans_of: dict[int, list[list[Span]]] = {}  # number of ranks -> spans
        self._own: Reading | None = None  # this rank's, of an epoch that other ranks began
        self._left = 0
        self._place, self._offset, self._laps = 0, None, 0
        self._columns: list[list[int]] = []

    def _batches_of(self, world_size: int) -> int:
        size = world_size * self.samples_per_batch
        num_batches = self._num_words // (size * self._bptt)
        return num_batches if self._limit is None else min(num_batches, self._limit // size)

    def _spans(self, world_size: int) -> list[list[Span]]:
        """Return, of each shard, the span of each of so many ranks."""
        if world_size not in self._spans_of:
            self._spans_of[world_size] = [line_spans(path, world_size) for path in self._paths]
        return self._spans_of[world_size]

    def idle_ranks(self) -> list[int]:
        """Return the ranks of this job for which there is no line."""
        of_shards = self._spans(self._world_size)
        return [
            rank
            for rank in range(self._world_size)
            if all(begin == end for begin, end in (spans[rank] for spans in of_shards))
        ]

    def start(
        self, epoch: int, first: int, position: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of an epoch, from a position to its end.

        Without a position, the batches before `first` are made and thrown away.
        Raises: ValueError if the position is that of other batches.
        """
        self._left = self.num_left(first, position)
        self._own, self._columns = None, [[] for _ in range(self.samples_per_batch)]
        self._place, self._offset, self._laps = 0, None, 0
        if position:
            self._take_up(position)
        self._lines = self._read_lines(self._own or self._reading(epoch, self._rank))
        for _ in range(0 if position else first):
            self._next_batch()
        return self._batches(self._left)

    def _batches(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(number):
            self._left -= 1
            yield self._next_batch()

    def num_left(self, first: int, position: Mapping[str, Any]) -> int:
        return position.get("left", self.num_batches - first)

    def position(self) -> dict[str, Any]:
        if self._offset is None and self._own is None:
            return {}
        words = [word for column in self._columns for word in column]
        anew = {} if self._own is None else {"reading": torch.tensor(self._own).view(-1, 3)}
        return {
            **anew,
            "left": self._left,
            "place": self._place,
            "offset": self._offset,
            "laps": self._laps,
            "words": torch.tensor(words, dtype=torch.int32),
            "lengths": torch.tensor([len(column) for column in self._columns]),
        }

    def _take_up(self, position: Mapping[str, Any]) -> None:
        place, columns = position["place"], _columns_of(position)
        if "reading" in position:
            self._own = [tuple(span) for span in position["reading"].tolist()]
        num_spans = len(self._own or self._paths)
        if len(columns) != self.samples_per_batch or place >= num_spans:
            raise ValueError(
                f"the position is one of {len(columns)} texts a rank in shard {place} of the "
                f"epoch; here are {self.samples_per_batch} texts and {num_spans} shards. "
                f"Resume with the batch size and the shards that the run was started with"
            )
        self._place, self._offset = place, position["offset"]
        self._laps, self._columns = position.get("laps", 0), columns

    # ---- what is read ----------------------------------------------------------------------------

    def _reading(self, epoch: int, rank: int, world_size: int | None = None) -> Reading:
        """Return what a rank of so many reads in an epoch: of each shard a span."""
        spans = self._spans(world_size or self._world_size)
        order = torch.randperm(len(self._paths), generator=seeded(self._seed, epoch)).tolist()
        return [(shard, *spans[shard][rank]) for shard in order]

    def _read_lines(self, reading: Reading) -> Iterator[list[int]]:
        """Yield the numbers of the words of line after line, without end.

        Begins at `_offset` of the span whose place it is; after the last span follows the first.
        """
        while True:
            shard, begin, end = reading[self._place]
            at = begin if self._offset is None else self._offset
            with open_text(self._paths[shard], _BUFFER_BYTES) as file:
                file.seek(file.tell() + at)
                while at < end:
                    line = file.readline()
                    at += len(line)
                    self._offset = at
                    yield self._vocabulary.encode_line(line)
            self._laps += self._place + 1 == len(reading)
            self._place, self._offset = (self._place + 1) % len(reading), None

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (T, B); a column keeps its last target as its next input."""
        length = self._bptt
        for column in self._columns:
            while len(column) <= length:
                column += next(self._lines)
        words = torch.tensor([column[: length + 1] for column in self._columns])
        for column in self._columns:
            del column[:length]
        return words[:, :-1].t().contiguous(), words[:, 1:].t().contiguous()

    # ---- other ranks -----------------------------------------------------------------------------

    def take_over(
        self, epoch: int, first: int, positions: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return this rank's position: what was not read of each shard is divided by lines, and the
        rest of the columns by columns."""
        world_size, texts = len(positions), []
        unread: dict[int, list[Span]] = {shard: [] for shard, *_ in self._reading(epoch, 0)}
        for rank, position in enumerate(positions):
            for shard, begin, end in self._unread(epoch, rank, world_size, position):
                unread[shard].append((begin, end))
            texts += [text for text in _columns_of(position) if len(text) > 1]
        left = positions[0].get("left", self._batches_of(world_size) - first)
        self._left = left * world_size // self._world_size
        mine = [
            (shard, *line_spans(self._paths[shard], self._world_size, *span)[self._rank])
            for shard, spans in unread.items()
            for span in _merged(spans)
        ]
        mine = [(shard, begin, end) for shard, begin, end in mine if begin < end]
        self._own = mine or self._reading(epoch, self._rank)  # nothing is left: from the first line
        self._place, self._offset, self._laps = 0, None, 0
        self._columns = _dealt(texts[self._rank :: self._world_size], self.samples_per_batch)
        return self.position()

    def _unread(
        self, epoch: int, rank: int, world_size: int, position: Mapping[str, Any]
    ) -> Reading:
        """Return what a rank of so many has not read yet."""
        if position.get("laps", 0):
            return []
        if "reading" in position:
            reading = [tuple(span) for span in position["reading"].tolist()]
        else:
            reading = self._reading(epoch, rank, world_size)
        if not position:
            return reading
        (shard, begin, end), *later = reading[position["place"] :]
        offset = position["offset"]
        return [(shard, begin if offset is None else offset, end), *later]


def _columns_of(position: Mapping[str, Any]) -> list[list[int]]:
    if not position:
        return []
    return [part.tolist() for part in position["words"].split(position["lengths"].tolist())]


def _merged(spans: list[Span]) -> list[Span]:
    """Return spans in order, those that touch as one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        elif begin < end:
            found.append((begin, end))
    return found


def _dealt(texts: list[list[int]], num_columns: int) -> list[list[int]]:
    """Return columns made of texts: each column has every num_columns-th."""
    columns: list[list[int]] = []
    for number in range(num_columns):
        column: list[int] = []
        for text in texts[number::num_columns]:
            column += text[1:] if column else text  # its first word has been a target already
        columns.append(column)
    return columns
