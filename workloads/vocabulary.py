"""Vocabularies: they number words, and turn text files into numbers.

A text is bytes in any encoding that keeps the white space of ASCII. Words are separated by white
space, and each end of a line is one more word, `<eos>`, as in the published WikiText-2.

Shapes: N words of a text, V of a vocabulary.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from workloads.text_files import is_plain, open_text

END, UNKNOWN = b"<eos>", b"<unk>"
_END_SPELLINGS = (END, b"</S>", b"</s>", b"<S>")  # 1b_word_vocab.txt writes <S> for start and end
_UNKNOWN_SPELLINGS = (UNKNOWN, b"<UNK>")
COUNTS_PREFIX = "word_counts."
_PIECE_BYTES = 4 * 2**20


class Vocabulary:
    """V words, numbered in the order given, and how often each occurs in the training text.

    Raises: ValueError if a word is there twice, or if there is no word for the end of a line or
        for unknown words.
    """

    def __init__(self, words: Sequence[bytes], word_counts: Tensor) -> None:
        self.words, self.word_counts = list(words), word_counts
        self.numbers = {word: number for number, word in enumerate(words)}
        if len(self.numbers) < len(self.words):
            twice = next(word for word, times in Counter(words).items() if times > 1)
            raise ValueError(f"the vocabulary has {twice.decode(errors='replace')!r} twice")
        self.end = self.numbers[_spelling(self.numbers, _END_SPELLINGS, "the end of a line")]
        self.unknown = self.numbers[_spelling(self.numbers, _UNKNOWN_SPELLINGS, "unknown words")]

    @classmethod
    def most_frequent(
        cls, words: Sequence[bytes], counts: Tensor, max_words: int | None, min_count: int = 1
    ) -> Vocabulary:
        """Make a vocabulary of the most frequent words, numbered by falling count.

        Words of equal count keep their order. The words left out are counted as `<unk>`.
        Args: words: must contain `<eos>` and `<unk>`, which are always kept, and are counted in
            max_words.
        """
        if max_words is not None and max_words < 3:
            raise ValueError(f"max_words is {max_words}; allowed: None, or 3 or more")
        unknown = words.index(UNKNOWN)
        special = torch.tensor([words.index(END), unknown])
        kept = counts >= min_count
        kept[special] = True
        if max_words is not None:
            ranks = counts.index_fill(0, special, torch.iinfo(torch.int64).max)
            kept[ranks.argsort(descending=True, stable=True)[max_words:]] = False
        num_others = counts[~kept].sum()
        counts = counts.masked_fill(~kept, -1)
        counts[unknown] += num_others
        order = counts.argsort(descending=True, stable=True)[: int(kept.sum())]
        return cls([words[n] for n in order.tolist()], counts[order])

    def __len__(self) -> int:
        return len(self.words)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that a model may take as arguments: num_words V, word_counts (V,) int64."""
        return {"num_words": len(self), "word_counts": self.word_counts}

    def encode_line(self, line: bytes) -> list[int]:
        """Return the numbers of the words of a line, and that of its end."""
        number, unknown = self.numbers.get, self.unknown
        numbers = [number(word, unknown) for word in line.split()]
        numbers.append(self.end)
        return numbers

    def encode(self, paths: Iterable[Path]) -> Tensor:
        """Return the numbers of the files' words in order, (N,) int32. Cost: see `read_texts`."""
        number, unknown = self.numbers.get, self.unknown
        end = self.words[self.end]
        return _join(_encode_pieces(paths, end, lambda word: number(word, unknown)))


def read_texts(
    files: Mapping[str, Sequence[Path]], max_words: int | None
) -> tuple[Vocabulary, dict[str, Tensor]]:
    """Return the vocabulary of the split "train", and the text of each split, (N,) int32.

    Args: files: split -> its files.
    Cost: each file is read once, at 6 million words a second on one core. The 103 million words of
        WikiText-103 take 20 s and 0.4 GB, and another 0.4 GB while their pieces are joined.
    """
    first_seen: defaultdict[bytes, int] = defaultdict(itertools.count().__next__)
    number = first_seen.__getitem__  # gives each new word the next number
    pieces = list(_encode_pieces(files["train"], END, number))
    number(END), number(UNKNOWN)
    words = list(first_seen)
    counts = torch.zeros(len(words), dtype=torch.int64)
    for piece in pieces:
        counts += torch.from_numpy(numpy.bincount(piece, minlength=len(words)))
    vocabulary = Vocabulary.most_frequent(words, counts, max_words)
    renumbered = numpy.array(
        [vocabulary.numbers.get(word, vocabulary.unknown) for word in words], dtype=numpy.int32
    )
    for piece in pieces:
        piece[:] = renumbered[piece]
    texts = {name: vocabulary.encode(paths) for name, paths in files.items() if name != "train"}
    return vocabulary, {"train": _join(pieces), **texts}


def count_words(paths: Iterable[Path]) -> dict[bytes, int]:
    """Return word -> count, sorted by falling count, words of equal count by their bytes.

    Cost: 6 million words a second on one core; memory only for the distinct words.
    """
    counts: Counter[bytes] = Counter()
    for path in paths:
        for piece in _pieces(path):
            counts.update(_split(piece, END))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_or_count(paths: Sequence[Path], root: str, file: str | None) -> dict[bytes, int]:
    """Return `count_words` from a file; if there is none, count and write it.

    The lines of the file are word, tab, count. If the file exists, it is complete.
    Args:   file: its path; None: a file in root, named after the number and size of the texts.
    Raises: ValueError if the file cannot be written, before anything is counted.
    """
    size = sum(path.stat().st_size for path in paths)
    # "unpacked": earlier versions counted compressed files as they are, under the name without it
    kind = "" if all(map(is_plain, paths)) else "unpacked."
    name = f"{COUNTS_PREFIX}{len(paths)}_files.{size}_bytes.{kind}tsv"
    target = Path(os.path.expanduser(file or Path(root) / name))
    if target.is_file():
        lines = (line.split(b"\t") for line in target.read_bytes().splitlines())
        return {word: int(count) for word, count in lines}
    try:
        scratch, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ValueError(
            f"the words are counted once, but {target} cannot be written ({error}); "
            f"name a file that can with --configs.dataset.counts FILE"
        ) from error
    try:
        with os.fdopen(scratch, "wb") as written:
            counts = count_words(paths)
            written.writelines(b"%s\t%d\n" % item for item in counts.items())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return counts


def read_word_list(path: Path) -> list[bytes]:
    """Return the first word of each line; a count may follow it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no vocabulary {path.resolve()}: a file with a word a line. Name it with "
            f"--configs.dataset.vocabulary FILE, or none, to have the text's words counted"
        )
    with open_text(path) as file:
        lines = file.read().splitlines()
    return [words[0] for line in lines if (words := line.split())]


def with_counts(words: Sequence[bytes], counts: Mapping[bytes, int]) -> Vocabulary:
    """Return the vocabulary of these words, in this order, with their counts in a text."""
    word_counts = torch.tensor([counts.get(word, 0) for word in words], dtype=torch.int64)
    vocabulary = Vocabulary(words, word_counts)
    word_counts[vocabulary.end] = counts.get(END, 0)
    word_counts[vocabulary.unknown] = 0
    word_counts[vocabulary.unknown] = sum(counts.values()) - int(word_counts.sum())
    return vocabulary


def _spelling(numbers: Mapping[bytes, int], spellings: Sequence[bytes], meaning: str) -> bytes:
    for word in spellings:
        if word in numbers:
            return word
    allowed = ", ".join(word.decode() for word in spellings)
    raise ValueError(f"the vocabulary has no word for {meaning}; add a line with one of {allowed}")


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the text in pieces of whole lines; the last line always ends with a newline."""
    with open_text(path) as file:
        while piece := file.read(_PIECE_BYTES):
            piece += file.readline()
            yield piece if piece.endswith(b"\n") else piece + b"\n"


def _split(piece: bytes, end: bytes) -> list[bytes]:
    return piece.replace(b"\n", b" " + end + b" ").split()


def _encode_pieces(
    paths: Iterable[Path], end: bytes, number: Callable[[bytes], int]
) -> Iterator[numpy.ndarray]:
    for path in paths:
        for piece in _pieces(path):
            words = _split(piece, end)
            yield numpy.fromiter(map(number, words), numpy.int32, len(words))


def _join(pieces: Iterable[numpy.ndarray]) -> Tensor:
    return torch.from_numpy(numpy.concatenate([numpy.empty(0, numpy.int32), *pieces]))
