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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from workloads.text import Text, check_bptt, too_short
from workloads.text_lines import StreamedBatches
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
        batches = StreamedBatches(
            self._paths,
            self._vocabulary,
            bptt=self._bptt,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_words=len(self),
            limit=samples_per_epoch,
            seed=seed,
        )
        if batches.num_batches < 1:
            raise ValueError(
                too_short(len(self), self._bptt, batch_size, world_size, samples_per_epoch)
            )
        if idle := batches.idle_ranks():
            raise ValueError(
                f"none of the shards' lines is for ranks {idle} of {world_size}; start fewer"
            )
        return batches


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
