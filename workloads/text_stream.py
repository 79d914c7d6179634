"""Texts in shards, read as they are trained on; for corpora that do not fit into memory.

Each epoch the ranks go through the shards in the same drawn order. Of a shard of S bytes, rank r of
W reads the lines that begin in bytes S*r/W to S*(r+1)/W, so that each line is one rank's. Each of a
rank's B columns holds what is left of its line, and takes the rank's next line when that runs out;
a batch is T rows of the columns, as in `workloads.text`. Memory does not grow with the shards. Of
one that is compressed by gzip every rank unpacks all that comes before its lines, and once at the
start the whole, for its size.

Texts to evaluate on are held in memory, at 4 bytes a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads.text import Text, check_bptt, seeded, too_short
from workloads.text_files import open_text
from workloads.vocabulary import (
    COUNTS_PREFIX,
    END,
    UNKNOWN,
    Vocabulary,
    read_or_count,
    read_word_list,
    with_counts,
)

_LM1B_FOLDER = "1-billion-word-language-modeling-benchmark-r13output"
_LM1B_TRAIN = "training-monolingual.tokenized.shuffled"
_LM1B_TEST = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
_BUFFER_BYTES = 2**20
Span = tuple[int, int]


def lm1b(
    root: str,
    bptt: int = 20,
    vocabulary: str | None = None,
    max_words: int | None = None,
    min_count: int = 3,
    counts: str | None = None,
) -> dict[str, TextShards | Text]:
    """The One Billion Word benchmark: 99 shards to "train", the first held-out file to "test".

    Source: Chelba et al. 2014 (arXiv:1312.3005); words seen 3 times or more, as published.
    Args:   root: the published archive's folder, or the folder that it was unpacked in; the
                others: as in `text_shards`.
    """
    root = os.path.expanduser(root)
    folders = [Path(root), Path(root) / _LM1B_FOLDER]
    folder = next((folder for folder in folders if (folder / _LM1B_TRAIN).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no {_LM1B_TRAIN}/ in {Path(root).resolve()} or {_LM1B_FOLDER}/ below it. Unpack "
            f"http://www.statmt.org/lm-benchmark/{_LM1B_FOLDER}.tar.gz (1.8 GB) there, or name "
            f"another folder with --configs.dataset.root FOLDER"
        )
    train = f"{_LM1B_TRAIN}/news.en-*-of-00100"
    return text_shards(
        str(folder), train, _LM1B_TEST, None, bptt, vocabulary, max_words, min_count, counts
    )


def text_shards(
    root: str,
    train: str = "train/*",
    test: str | None = "test/*",
    valid: str | None = None,
    bptt: int = 35,
    vocabulary: str | None = None,
    max_words: int | None = None,
    min_count: int = 1,
    counts: str | None = None,
) -> dict[str, TextShards | Text]:
    """Text in shards under `root`: "train" is streamed, "test" and "valid" are in memory.

    Shards may be compressed by gzip.
    Args: train, test, valid: patterns of file names below root, e.g. "train/part-*"; test or valid
              may be None.
          vocabulary: a file with a word a line (what stands behind it is passed over), numbered in
              that order, one of them `<eos>`, `</S>` or `<S>` and one `<unk>` or `<UNK>`; None: the
              most frequent words of the training text.
          max_words, min_count: of a vocabulary that is not given: at most so many words, each seen
              so often; the others become `<unk>`.
          counts: where the words of the training shards and their counts are kept, made if it is
              not there; None: a file in root named after the shards' number and size.
    Cost: the words are counted once, 6 million a second: 2 to 3 minutes for one billion.
    """
    check_bptt(bptt)
    if vocabulary is not None and max_words is not None:
        raise ValueError(
            f"max_words is {max_words}, but vocabulary {vocabulary} says which words there are; "
            f"allowed: None, or no vocabulary"
        )
    root = os.path.expanduser(root)
    patterns = {"train": train, "test": test, "valid": valid}
    files = {name: _shards(root, name, glob) for name, glob in patterns.items() if glob is not None}
    both = set(files["train"]) & {path for name in files.keys() - {"train"} for path in files[name]}
    if both:
        raise ValueError(
            f"{sorted(both)[0]} is both trained and evaluated on; change configs.dataset.train, "
            f"test or valid"
        )
    counted = read_or_count(files["train"], root, counts)
    if vocabulary is not None:
        words = with_counts(read_word_list(Path(os.path.expanduser(vocabulary))), counted)
    else:
        for special in (END, UNKNOWN):
            counted.setdefault(special, 0)
        frequencies = torch.tensor(list(counted.values()), dtype=torch.int64)
        words = Vocabulary.most_frequent(list(counted), frequencies, max_words, min_count)
    splits: dict[str, TextShards | Text] = {"train": TextShards(files.pop("train"), words, bptt)}
    for name, paths in files.items():
        splits[name] = Text(words.encode(paths), words.facts, bptt)
    return splits


class TextShards:
    """A split: shards to train on, of which a batch's words are in memory. Its length: of them all.

    Args: vocabulary: with the counts of these shards' words; bptt: rows T of a batch.
    """

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary, bptt: int) -> None:
        self._paths, self._vocabulary, self._bptt = list(paths), vocabulary, bptt
        self.facts = vocabulary.facts

    def __len__(self) -> int:
        return int(self._vocabulary.word_counts.sum())

    def batches(
        self,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        is_training: bool,
        samples_per_epoch: int | None,
    ) -> StreamedBatches:
        """Return batches of (words (T, B) int64, targets (T, B) int64): targets are the next words.

        An epoch is a world_size-th of all words on every rank: one whose lines have fewer goes on
        from its first ones, one whose lines have more leaves the last out.
        Epochs cut short by samples_per_epoch begin with different shards.
        Raises: ValueError if an epoch holds less than one batch, if some rank has no line, or to
            evaluate.
        """
        if not is_training:
            raise ValueError("shards are streamed for training only; evaluate on test or valid")
        num_batches = len(self) // (world_size * batch_size * self._bptt)
        if samples_per_epoch is not None:
            num_batches = min(num_batches, samples_per_epoch // (world_size * batch_size))
        spans = [_line_spans(path, world_size) for path in self._paths]
        idle = [r for r in range(world_size) if all(b == e for b, e in (s[r] for s in spans))]
        if num_batches < 1:
            raise ValueError(
                too_short(len(self), self._bptt, batch_size, world_size, samples_per_epoch)
            )
        if idle:
            raise ValueError(
                f"none of the shards' lines is for ranks {idle} of {world_size}; start fewer"
            )
        mine = [of_ranks[rank] for of_ranks in spans]
        return StreamedBatches(
            self._paths, mine, self._vocabulary, batch_size, self._bptt, num_batches, seed
        )


class StreamedBatches:
    """T rows after T rows of B columns, filled from the spans of the shards, line by line.

    Cost: 3 million words a second on one core, where the shards are in the system's cache.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        spans: Sequence[Span],
        vocabulary: Vocabulary,
        batch_size: int,
        bptt: int,
        num_batches: int,
        seed: int,
    ) -> None:
        self._paths, self._spans, self._vocabulary = paths, spans, vocabulary
        self._bptt, self._seed = bptt, seed
        self.num_batches, self.samples_per_batch = num_batches, batch_size
        self._place, self._offset = 0, None
        self._columns: list[list[int]] = []

    def start(
        self, epoch: int, first: int, position: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of an epoch from number `first` on.

        Without a position the batches before `first` are made and thrown away.
        Raises: ValueError if the position is that of other batches.
        """
        order = torch.randperm(len(self._paths), generator=seeded(self._seed, epoch)).tolist()
        self._place, self._offset = 0, None
        self._columns = [[] for _ in range(self.samples_per_batch)]
        taken_up = first > 0 and bool(position)
        if taken_up:
            self._take_up(position)
        self._lines = self._read_lines(order, self._place, self._offset)
        for _ in range(0 if taken_up else first):
            self._next_batch()
        return (self._next_batch() for _ in range(first, self.num_batches))

    def position(self) -> dict[str, Any]:
        """Return the shard's place in the epoch's order, the byte of its text (see
        workloads.text_files) at which the next line begins, and what is left in the columns, one
        after the other: "words" int32, "lengths" (B,)."""
        if self._offset is None:
            return {}
        words = [word for column in self._columns for word in column]
        return {
            "place": self._place,
            "offset": self._offset,
            "words": torch.tensor(words, dtype=torch.int32),
            "lengths": torch.tensor([len(column) for column in self._columns]),
        }

    def _take_up(self, position: Mapping[str, Any]) -> None:
        place, lengths = position["place"], position["lengths"].tolist()
        if len(lengths) != self.samples_per_batch or place >= len(self._paths):
            raise ValueError(
                f"the position is one of {len(lengths)} texts a rank in shard {place} of the "
                f"epoch; here are {self.samples_per_batch} texts and {len(self._paths)} shards. "
                f"Resume with the batch size and the shards that the run was started with"
            )
        self._place, self._offset = place, position["offset"]
        self._columns = [part.tolist() for part in position["words"].split(lengths)]

    def _read_lines(
        self, order: Sequence[int], place: int, offset: int | None
    ) -> Iterator[list[int]]:
        """Yield the lines' numbers from a shard's place and an offset on, around and around."""
        while True:
            begin, end = self._spans[order[place]]
            at = begin if offset is None else offset
            with open_text(self._paths[order[place]], _BUFFER_BYTES) as file:
                file.seek(file.tell() + at)
                while at < end:
                    line = file.readline()
                    at += len(line)
                    self._place, self._offset = place, at
                    yield self._vocabulary.encode_line(line)
            place, offset = (place + 1) % len(order), None

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Return (T, B) inputs and targets; a column keeps its last target, the next input."""
        length = self._bptt
        for column in self._columns:
            while len(column) <= length:
                column += next(self._lines)
        words = torch.tensor([column[: length + 1] for column in self._columns])
        for column in self._columns:
            del column[:length]
        return words[:, :-1].t().contiguous(), words[:, 1:].t().contiguous()


def _line_spans(path: Path, num_parts: int) -> list[Span]:
    """Return where each part's lines begin and end in the text: equal parts, moved on to line
    starts."""
    bounds = [0]
    with open_text(path) as file:
        start = file.tell()
        size = file.seek(0, os.SEEK_END) - start
        for part in range(1, num_parts):
            wanted = size * part // num_parts
            if wanted > bounds[-1]:
                file.seek(start + wanted - 1)
                file.readline()
                bounds.append(file.tell() - start)
            else:  # inside the line that ends the part before
                bounds.append(bounds[-1])
    return list(zip(bounds, [*bounds[1:], size], strict=True))


def _shards(root: str, name: str, glob: str) -> list[Path]:
    """Return the files of a pattern in order, hidden ones and the kept counts left out."""
    paths = sorted(
        path
        for path in Path(root).glob(glob)
        if path.is_file() and not path.name.startswith((".", COUNTS_PREFIX))
    )
    if not paths:
        raise FileNotFoundError(
            f"no file {glob} in {Path(root).resolve()}; name the folder of the shards with "
            f"--configs.dataset.root FOLDER, or those to {name} with --configs.dataset.{name} GLOB"
        )
    return paths
