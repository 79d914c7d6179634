"""Texts in which some words are masked, to be guessed from those around them.

Source:  Devlin et al. 2019 (arXiv:1810.04805), section 3.1, masked language model.
Differs: whole words of a plain text, not word pieces of two segments; sequences run over line ends.

Shapes: T = sequence_length words of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from workloads.tasks import NOT_COUNTED
from workloads.text import folder_files, wikitext_files
from workloads.vocabulary import Vocabulary, read_texts

_SHARE_MASKED, _SHARE_RANDOM = 0.8, 0.1  # of the words chosen; the others stay


def masked_wikitext(
    root: str,
    name: str = "wikitext-2",
    sequence_length: int = 128,
    max_words: int | None = 30522,
    mask_fraction: float = 0.15,
    download: bool = True,
) -> dict[str, MaskedText]:
    """WikiText as masked samples. Args: as in `workloads.text.wikitext` and `MaskedText`."""
    files = wikitext_files(root, name, download)
    return _masked(files, sequence_length, max_words, mask_fraction)


def masked_text_folder(
    root: str,
    sequence_length: int = 128,
    max_words: int | None = 30522,
    mask_fraction: float = 0.15,
) -> dict[str, MaskedText]:
    """Plain text as masked samples. Args: as in `workloads.text.text_folder` and `MaskedText`."""
    return _masked(folder_files(root), sequence_length, max_words, mask_fraction)


class MaskedText(Dataset):
    """Samples (inputs (T,) int64, targets (T,) int64), targets -100 where nothing is to be guessed.

    Of each sample round(mask_fraction * T) words, one at least, are to be guessed. In the inputs a
    word of these is, with chance 80%, 10%, 10%: `<mask>`, any word of the vocabulary, itself. All
    draws are torch's default generator's.

    Args:   words: (N,) int32; what fills no sample at its end is left out.
            vocabulary: `<mask>` is numbered after its words, and one of facts["num_words"].
    Raises: ValueError if the text does not fill a sample.
    """

    def __init__(
        self, words: Tensor, vocabulary: Vocabulary, sequence_length: int, mask_fraction: float
    ) -> None:
        num_samples = len(words) // sequence_length
        if num_samples < 1:
            raise ValueError(
                f"a text of {len(words)} words does not fill one sample of {sequence_length}; "
                f"lower configs.dataset.sequence_length"
            )
        self._samples = words[: num_samples * sequence_length].view(num_samples, sequence_length)
        self._num_to_guess = max(1, round(mask_fraction * sequence_length))
        self._mask = len(vocabulary)
        counts = torch.cat([vocabulary.word_counts, vocabulary.word_counts.new_zeros(1)])
        self.facts = {"num_words": self._mask + 1, "word_counts": counts}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        words = self._samples[index].long()
        chosen = torch.randperm(len(words))[: self._num_to_guess]
        targets = torch.full_like(words, NOT_COUNTED)
        targets[chosen] = words[chosen]
        draw = torch.rand(len(chosen))
        others = torch.randint(self._mask, (len(chosen),))
        shown = torch.where(draw < _SHARE_MASKED + _SHARE_RANDOM, others, words[chosen])
        words[chosen] = shown.masked_fill(draw < _SHARE_MASKED, self._mask)
        return words, targets


def _masked(
    files: Mapping[str, Sequence[Path]],
    sequence_length: int,
    max_words: int | None,
    mask_fraction: float,
) -> dict[str, MaskedText]:
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; allowed: 2 words or more")
    if not 0 < mask_fraction < 1:
        raise ValueError(f"mask_fraction is {mask_fraction}; allowed: between 0 and 1")
    if max_words is not None and max_words < 4:
        raise ValueError(
            f"max_words is {max_words}; allowed: None, or 4 or more: a word, <unk>, <eos>, <mask>"
        )
    room = None if max_words is None else max_words - 1
    vocabulary, texts = read_texts(files, room)
    return {
        split: MaskedText(words, vocabulary, sequence_length, mask_fraction)
        for split, words in texts.items()
    }
