"""Texts held in memory, and their batches for truncated back-propagation through time.

A text of N words is cut into C columns, of which each rank has B = batch_size. A batch is T = bptt
rows of a rank's columns. The next batch continues where it ends, so that the state of a recurrent
network can be handed from one batch to the next. A sample is T words of one column.

Errors about a missing folder say where it was looked for and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from workloads.download import fetch_zip
from workloads.tasks import NOT_COUNTED
from workloads.text_columns import ColumnBatches
from workloads.vocabulary import read_texts

_SHA1 = {  # of the files in the published archives
    "wikitext-2": {
        "wiki.train.tokens": "863f29c46ef9d167fff4940ec821195882fe29d1",
        "wiki.valid.tokens": "0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422",
        "wiki.test.tokens": "c7b8ce0aa086fb34dab808c5c49224211eb2b172",
    },
    "wikitext-103": {
        "wiki.train.tokens": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
        "wiki.valid.tokens": "c326ac59dc587676d58c422eb8a03e119582f92b",
        "wiki.test.tokens": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
    },
}
_MIRRORS = (  # the author's site, and the original one, which no longer answers everywhere
    "https://wikitext.smerity.com/{name}-v1.zip",
    "https://s3.amazonaws.com/research.metamind.io/wikitext/{name}-v1.zip",
)


def wikitext(
    root: str,
    name: str = "wikitext-2",
    bptt: int = 35,
    max_words: int | None = None,
    download: bool = True,
) -> dict[str, Text]:
    """WikiText-2 or WikiText-103, word level, as "train", "valid" and "test".

    Source: Merity et al. 2016 (arXiv:1609.07843).
    Args:   root: a folder with train.txt, valid.txt and test.txt, or with the published
                wiki.train.tokens etc.; or a folder in which a folder called `name` has them.
            bptt: rows T of a batch.
            max_words: size of the vocabulary, including `<unk>` and `<eos>`; None: all words of
                the training text (33,278 and 267,735).
            download: download the published archive (4 and 190 MB) if the files are not there.
    """
    return _in_memory(wikitext_files(root, name, download), bptt, max_words)


def text_folder(root: str, bptt: int = 35, max_words: int | None = None) -> dict[str, Text]:
    """Your own text as "train", and "valid" or "test" or both.

    Args: root: a folder with train.txt, or with a folder train of *.txt files, which are read in
              the order of their names; likewise valid and test. Each file may be compressed by
              gzip, as *.txt.gz.
          bptt, max_words: see `wikitext`.
    """
    return _in_memory(folder_files(root), bptt, max_words)


class Text:
    """A split: one text in memory, of len() words.

    Args: words: (N,) int32. facts: those of the vocabulary. bptt: rows T of a batch.
    """

    def __init__(self, words: Tensor, facts: Mapping[str, Any], bptt: int) -> None:
        check_bptt(bptt)
        self._words, self._bptt = words, bptt
        self.facts = dict(facts)

    def __len__(self) -> int:
        return len(self._words)

    def batches(
        self,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        is_training: bool,
        samples_per_epoch: int | None,
    ) -> ColumnBatches:
        """Return batches of (words (T, B) int64, targets (T, B) int64): targets are the next words.

        Training: rows that do not fill a batch are left out; each epoch draws at random how many
        of them at the beginning of the columns.
        Evaluation: each word except the text's first one is a target exactly once, over all ranks;
        columns are filled up with targets of -100. The first words of a column are predicted
        without the words before them, which are in another column.
        Raises: ValueError if an epoch holds less than one batch.
        """
        if len(self) < 2:
            raise ValueError(f"a text of {len(self)} words has none to predict; is its file empty?")
        batches = ColumnBatches(
            self._words,
            self._training_columns if is_training else self._evaluation_columns,
            bptt=self._bptt,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            limit=samples_per_epoch if is_training else None,
            seed=seed,
        )
        if batches.num_batches < 1:
            raise ValueError(
                too_short(len(self), self._bptt, batch_size, world_size, samples_per_epoch)
            )
        return batches

    def _training_columns(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, views (C, L) that are shifted by one word."""
        length = max(0, len(self) - 1) // num_columns
        size = num_columns * length
        return tuple(
            self._words[first : first + size].view(num_columns, length) for first in (0, 1)
        )

    def _evaluation_columns(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (C, L); L is the least multiple of T that fits the text."""
        num_targets = max(0, len(self) - 1)
        length = -(-num_targets // (num_columns * self._bptt)) * self._bptt
        filling = (0, num_columns * length - num_targets)
        inputs = pad(self._words[:-1], filling)
        targets = pad(self._words[1:], filling, value=NOT_COUNTED)
        return inputs.view(num_columns, length), targets.view(num_columns, length)


def check_bptt(bptt: int) -> None:
    if bptt < 1:
        raise ValueError(f"bptt is {bptt}; allowed: 1 or more words of a text in a batch")


def too_short(
    num_words: int, bptt: int, batch_size: int, world_size: int, samples_per_epoch: int | None
) -> str:
    """Return the error message for an epoch that has no batch."""
    limit = "" if samples_per_epoch is None else f" (at most {samples_per_epoch} texts an epoch)"
    return (
        f"{num_words} words{limit} do not fill one batch of {batch_size} texts a rank x "
        f"{world_size} ranks x {bptt} words, and the word after; lower "
        f"configs.train.batch_size_per_rank or configs.dataset.bptt, or raise "
        f"configs.data.samples_per_epoch"
    )


def wikitext_files(root: str, name: str, download: bool) -> dict[str, list[Path]]:
    """Return the files of each split; download them if they are not there. See `wikitext`."""
    if name not in _SHA1:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(_SHA1)}")
    root, failures = os.path.expanduser(root), ""
    for folder in (Path(root) / name, Path(root)):
        for pattern in ("{}.txt", "wiki.{}.tokens"):
            files = {
                split: [folder / pattern.format(split)] for split in ("train", "valid", "test")
            }
            if all(file.is_file() for [file] in files.values()):
                return files
    if download:
        addresses = [mirror.format(name=name) for mirror in _MIRRORS]
        try:
            fetch_zip(addresses, Path(root) / name, _SHA1[name])
            return wikitext_files(root, name, download=False)
        except OSError as error:
            failures = f" Downloading failed: {error}."
    raise FileNotFoundError(
        f"no {name} in {Path(root).resolve()} or {name}/ below it: there should be train.txt, "
        f"valid.txt and test.txt, or wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens as "
        f"in {_MIRRORS[0].format(name=name)}.{failures} Put them there, or name their folder with "
        f"--configs.dataset.root FOLDER"
    )


def folder_files(root: str) -> dict[str, list[Path]]:
    """Return the files of the splits that a folder has. See `text_folder`."""
    root, files = os.path.expanduser(root), {}
    for split in ("train", "valid", "test"):
        found = _texts(Path(root), split) or sorted(_texts(Path(root) / split, "*"))
        if found:
            files[split] = found
    if "train" not in files or len(files) < 2:
        have = ", ".join(files) or "none of them"
        raise FileNotFoundError(
            f"{Path(root).resolve()} should have train.txt or train.txt.gz, or train/ with such "
            f"files in it, and likewise valid or test; it has {have}. Name the text's folder with "
            f"--configs.dataset.root FOLDER"
        )
    return files


def _texts(folder: Path, name: str) -> list[Path]:
    """Return the text files of a pattern: *.txt, and *.txt.gz that are not there as *.txt too."""
    plain = list(folder.glob(f"{name}.txt"))
    packed = [path for path in folder.glob(f"{name}.txt.gz") if path.with_suffix("") not in plain]
    return [path for path in plain + packed if path.is_file()]


def _in_memory(
    files: Mapping[str, Sequence[Path]], bptt: int, max_words: int | None
) -> dict[str, Text]:
    check_bptt(bptt)
    vocabulary, texts = read_texts(files, max_words)
    return {split: Text(words, vocabulary.facts, bptt) for split, words in texts.items()}
