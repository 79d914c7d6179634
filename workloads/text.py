"""Texts held in memory, and their batches for truncated back-propagation through time.

A text of N words is cut into C columns, B = batch_size of them on each rank; a batch is T = bptt
rows of a rank's columns, and the next batch goes on where it ends, so a recurrent network's state
may be carried from one to the next. A sample is T words of one column.

Refuses: a missing folder, with where it looked and what to do; a batch for which a text is too
short.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workloads.download import fetch_zip
from workloads.tasks import NOT_COUNTED
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
_MIRRORS = (  # the author's, and the first one, which no longer answers everywhere
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
    Args:   root: the folder of train.txt, valid.txt and test.txt, or of the published
                wiki.train.tokens etc., or the folder above, where they are in one called `name`.
            bptt: rows T of a batch.
            max_words: words of the vocabulary, `<unk>` and `<eos>` among them; None: all of the
                training text (33,278 and 267,735).
            download: fetch the published archive (4 and 190 MB) where no folder has the files.
    """
    return _in_memory(wikitext_files(root, name, download), bptt, max_words)


def text_folder(root: str, bptt: int = 35, max_words: int | None = None) -> dict[str, Text]:
    """Text under `root`: train, and valid or test or both, each a .txt file or a folder.

    Args: root: has train.txt, or train/ with *.txt in it, read in the order of their names;
              likewise valid and test. Each may be compressed by gzip, as *.txt.gz.
          bptt, max_words: as in `wikitext`.
    """
    return _in_memory(folder_files(root), bptt, max_words)


class Text:
    """A split: one text in memory. Its length is that of the text.

    Args: words: (N,) int32; facts: of the vocabulary; bptt: rows T of a batch.
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

        Training: rows that fill no batch are left out; which, each epoch draws anew.
        Evaluation: each word but the text's first is a target once, over all ranks; columns are
        filled up with targets of -100. A column's first words are predicted from themselves alone.
        Raises: ValueError if an epoch holds less than one batch.
        """
        num_columns = batch_size * world_size
        cut = self._training_columns if is_training else self._evaluation_columns
        inputs, targets = cut(num_columns)
        num_batches = inputs.shape[1] // self._bptt
        if is_training and samples_per_epoch is not None:
            num_batches = min(num_batches, samples_per_epoch // num_columns)
        if len(self) < 2:
            raise ValueError(f"a text of {len(self)} words has none to predict; is its file empty?")
        if num_batches < 1:
            raise ValueError(
                too_short(len(self), self._bptt, batch_size, world_size, samples_per_epoch)
            )
        mine = slice(rank * batch_size, (rank + 1) * batch_size)
        return ColumnBatches(inputs[mine], targets[mine], self._bptt, num_batches, seed)

    def _training_columns(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return views (C, L): inputs, and targets; a column's last target begins the next."""
        length = max(0, len(self) - 1) // num_columns
        size = num_columns * length
        return tuple(
            self._words[first : first + size].view(num_columns, length) for first in (0, 1)
        )

    def _evaluation_columns(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """Return (C, L) inputs and targets, L the least multiple of T that holds the text."""
        num_targets = max(0, len(self) - 1)
        length = -(-num_targets // (num_columns * self._bptt)) * self._bptt
        filling = (0, num_columns * length - num_targets)
        inputs = pad(self._words[:-1], filling)
        targets = pad(self._words[1:], filling, value=NOT_COUNTED)
        return inputs.view(num_columns, length), targets.view(num_columns, length)


class ColumnBatches:
    """T rows after T rows of B columns. Args: inputs, targets: (B, L) int32."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, bptt: int, num_batches: int, seed: int
    ) -> None:
        self._inputs, self._targets, self._bptt, self._seed = inputs, targets, bptt, seed
        self.num_batches, self.samples_per_batch = num_batches, inputs.shape[0]

    def start(
        self, epoch: int, first: int, position: Mapping[str, Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from number `first` on."""
        left_out = self._inputs.shape[1] - self.num_batches * self._bptt
        begin = int(torch.randint(left_out + 1, (), generator=seeded(self._seed, epoch)))
        for number in range(first, self.num_batches):
            row = begin + number * self._bptt
            yield tuple(
                columns[:, row : row + self._bptt].t().long().contiguous()
                for columns in (self._inputs, self._targets)
            )

    def position(self) -> dict[str, Any]:
        """Return {}: epoch and number say where a batch is."""
        return {}


def seeded(seed: int, epoch: int) -> torch.Generator:
    """Return a generator that depends on these two alone."""
    return torch.Generator().manual_seed(hash((seed, epoch)) & 0x7FFFFFFFFFFFFFFF)


def check_bptt(bptt: int) -> None:
    if bptt < 1:
        raise ValueError(f"bptt is {bptt}; allowed: 1 or more words of a text in a batch")


def too_short(
    num_words: int, bptt: int, batch_size: int, world_size: int, samples_per_epoch: int | None
) -> str:
    """Return the message for an epoch without a batch."""
    limit = "" if samples_per_epoch is None else f" (at most {samples_per_epoch} texts an epoch)"
    return (
        f"{num_words} words{limit} do not fill one batch of {batch_size} texts a rank x "
        f"{world_size} ranks x {bptt} words, and the word after; lower "
        f"configs.train.batch_size_per_rank or configs.dataset.bptt, or raise "
        f"configs.data.samples_per_epoch"
    )


def wikitext_files(root: str, name: str, download: bool) -> dict[str, list[Path]]:
    """Return the files of each split, downloaded where there are none. See `wikitext`."""
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
    """Return the files of each split that a folder of plain text has. See `text_folder`."""
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
    """Return the texts of a pattern; packed ones if they do not lie there unpacked too."""
    plain = list(folder.glob(f"{name}.txt"))
    packed = [path for path in folder.glob(f"{name}.txt.gz") if path.with_suffix("") not in plain]
    return [path for path in plain + packed if path.is_file()]


def _in_memory(
    files: Mapping[str, Sequence[Path]], bptt: int, max_words: int | None
) -> dict[str, Text]:
    check_bptt(bptt)
    vocabulary, texts = read_texts(files, max_words)
    return {split: Text(words, vocabulary.facts, bptt) for split, words in texts.items()}
