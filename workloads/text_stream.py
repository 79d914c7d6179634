"""Texts in shards, streamed during training, for corpora that do not fit into memory.

In each epoch all ranks read the shards in the same random order. Of a shard of S bytes, rank r of W
reads the lines that begin in bytes S*r/W to S*(r+1)/W, so that each line is read by one rank. Each
of a rank's B columns holds the rest of a line; when that is used up, it takes the rank's next line.
A batch is T rows of the columns, as in `workloads.text`. The memory needed does not depend on the
size of the shards. Of a shard that is compressed by gzip, every rank unpacks everything before its
own lines, and once at the start the whole shard, to know its size.

Texts for evaluation are held in memory, at 4 bytes a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads.text import Text, check_bptt, seeded, too_short
from workloads.text_files import Span, line_spans, open_text
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


def lm1b(
    root: str,
    bptt: int = 20,
    vocabulary: str | None = None,
    max_words: int | None = None,
    min_count: int = 3,
    counts: str | None = None,
) -> dict[str, TextShards | Text]:
    """The One Billion Word benchmark: 99 shards as "train", the first held-out file as "test".

    Source: Chelba et al. 2014 (arXiv:1312.3005); like there, its words are those seen 3 times.
    Args:   root: the folder of the published archive, or the folder in which it was unpacked. The
                other arguments: see `text_shards`.
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

    Args: train, test, valid: patterns of file names below root, e.g. "train/part-*"; test or valid
              may be None.
          vocabulary: a file with one word at the beginning of each line, numbered in this order.
              One word must be `<eos>`, `</S>` or `<S>`, and one `<unk>` or `<UNK>`. None: the most
              frequent words of the training text.
          max_words, min_count: if vocabulary is None: take at most so many words, each seen at
              least so often; the others become `<unk>`.
          counts: a file with the words of the training shards and their counts, which is written if
              it is not there; None: a file in root, named after the number and size of the shards.
    Cost: the words are counted once, at 6 million a second: 2 to 3 minutes for one billion.
    """
    check_bptt(bptt)
    if vocabulary is not None and max_words is not None:
        raise ValueError(
            f"max_words is {max_words}, but vocabulary {vocabulary} says which words there are; "
            f"allowed: None, or no vocabulary"
        )
    files = _files_of_splits(root, {"train": train, "test": test, "valid": valid})
    counted = read_or_count(files["train"], root, counts)
    if vocabulary is not None:
        words = with_counts(read_word_list(Path(os.path.expanduser(vocabulary))), counted)
    else:
        words = _most_frequent(counted, max_words, min_count)
    splits: dict[str, TextShards | Text] = {"train": TextShards(files.pop("train"), words, bptt)}
    for name, paths in files.items():
        splits[name] = Text(words.encode(paths), words.facts, bptt)
    return splits


def _files_of_splits(root: str, patterns: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Return the files of each split with a pattern; refuse to train and evaluate on the same."""
    root = os.path.expanduser(root)
    files = {name: _shards(root, name, glob) for name, glob in patterns.items() if glob is not None}
    both = set(files["train"]) & {path for name in files.keys() - {"train"} for path in files[name]}
    if both:
        raise ValueError(
            f"{sorted(both)[0]} is both trained and evaluated on; change configs.dataset.train, "
            f"test or valid"
        )
    return files


def _most_frequent(counted: dict[bytes, int], max_words: int | None, min_count: int) -> Vocabulary:
    for special in (END, UNKNOWN):
        counted.setdefault(special, 0)
    frequencies = torch.tensor(list(counted.values()), dtype=torch.int64)
    return Vocabulary.most_frequent(list(counted), frequencies, max_words, min_count)


class TextShards:
    """A split: shards to train on, of len() words in all. Only a batch's words are in memory.

    Args: vocabulary: with the counts of its words in these shards. bptt: rows T of a batch.
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

        In an epoch, every rank sees as many words as a world_size-th of all. A rank whose lines
        have fewer words begins again at its first line; one whose lines have more leaves the last
        ones out. Epochs cut short by samples_per_epoch begin with different shards.
        Raises: ValueError if an epoch holds less than one batch, if a rank has no line, or if the
            batches are not for training.
        """
        if not is_training:
            raise ValueError("shards are streamed for training only; evaluate on test or valid")
        num_batches = len(self) // (world_size * batch_size * self._bptt)
        if samples_per_epoch is not None:
            num_batches = min(num_batches, samples_per_epoch // (world_size * batch_size))
        spans = [line_spans(path, world_size) for path in self._paths]
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
    """Batches of T rows of B columns, which are filled line by line from spans of the shards.

    Cost: 3 million words a second on one core, if the shards are in the system's cache.
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
        self._turn, self._offset = 0, None  # position in the order of shards, and in the shard
        self._columns: list[list[int]] = []

    def start(
        self, epoch: int, first: int, position: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over the batches of an epoch, beginning with number `first`.

        Without a position, the batches before `first` are made and thrown away.
        Raises: ValueError if the position is that of other batches.
        """
        order = torch.randperm(len(self._paths), generator=seeded(self._seed, epoch)).tolist()
        self._turn, self._offset = 0, None
        self._columns = [[] for _ in range(self.samples_per_batch)]
        taken_up = first > 0 and bool(position)
        if taken_up:
            self._take_up(position)
        self._lines = self._read_lines(order, self._turn, self._offset)
        for _ in range(0 if taken_up else first):
            self._next_batch()
        return (self._next_batch() for _ in range(first, self.num_batches))

    def position(self) -> dict[str, Any]:
        """Return where the next batch begins, as a checkpoint stores it.

        "place": the shard's position in the epoch's order; "offset": the byte of its text at which
        the next line begins; "words", int32: the rest of all columns, one after the other;
        "lengths", (B,): how many words belong to each.
        """
        if self._offset is None:
            return {}
        words = [word for column in self._columns for word in column]
        return {
            "place": self._turn,
            "offset": self._offset,
            "words": torch.tensor(words, dtype=torch.int32),
            "lengths": torch.tensor([len(column) for column in self._columns]),
        }

    def _take_up(self, position: Mapping[str, Any]) -> None:
        turn, lengths = position["place"], position["lengths"].tolist()
        if len(lengths) != self.samples_per_batch or turn >= len(self._paths):
            raise ValueError(
                f"the position is one of {len(lengths)} texts a rank in shard {turn} of the "
                f"epoch; here are {self.samples_per_batch} texts and {len(self._paths)} shards. "
                f"Resume with the batch size and the shards that the run was started with"
            )
        self._turn, self._offset = turn, position["offset"]
        self._columns = [part.tolist() for part in position["words"].split(lengths)]

    def _read_lines(
        self, order: Sequence[int], turn: int, offset: int | None
    ) -> Iterator[list[int]]:
        """Yield the numbers of the words of line after line, without end.

        Begins at an offset of the shard whose turn it is; after the last shard follows the first.
        """
        while True:
            begin, end = self._spans[order[turn]]
            at = begin if offset is None else offset
            with open_text(self._paths[order[turn]], _BUFFER_BYTES) as file:
                file.seek(file.tell() + at)
                while at < end:
                    line = file.readline()
                    at += len(line)
                    self._turn, self._offset = turn, at
                    yield self._vocabulary.encode_line(line)
            turn, offset = (turn + 1) % len(order), None

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


def _shards(root: str, name: str, glob: str) -> list[Path]:
    """Return the files of a pattern, sorted, without hidden files and files of word counts."""
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
