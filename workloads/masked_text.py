"""Texts with masked words, which a model predicts from the words around them.

Source:  Devlin et al. 2019 (arXiv:1810.04805), section 3.1, masked language model.
Differs: a sample is a piece of one plain text, in whole words and across line ends; BERT's samples
         are two segments in word pieces.

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

_MASKED, _RANDOM = 0.8, 0.1  # chances that a chosen word becomes <mask>, or any word


def masked_wikitext(
    root: str,
    name: str = "wikitext-2",
    sequence_length: int = 128,
    max_words: int | None = 30522,
    mask_fraction: float = 0.15,
    download: bool = True,
) -> dict[str, MaskedText]:
    """WikiText as masked samples. Args: see `workloads.text.wikitext` and `MaskedText`."""
    files = wikitext_files(root, name, download)
    return _masked(files, sequence_length, max_words, mask_fraction)


def masked_text_folder(
    root: str,
    sequence_length: int = 128,
    max_words: int | None = 30522,
    mask_fraction: float = 0.15,
) -> dict[str, MaskedText]:
    """Plain text as masked samples. Args: see `workloads.text.text_folder` and `MaskedText`."""
    return _masked(folder_files(root), sequence_length, max_words, mask_fraction)


class MaskedText(Dataset):
    """Samples (inputs (T,) int64, targets (T,) int64).

    In each sample round(mask_fraction * T) words, at least one, are chosen to be predicted; the
    other targets are -100. Of the chosen words, 80% are replaced by `<mask>` in the inputs, 10% by
    any word of the vocabulary, and 10% stay. Everything is drawn from torch's default generator.

    Args:   words: (N,) int32; words at the end that do not fill a sample are left out.
            vocabulary: of the text. `<mask>` gets the number after its words, and is counted in
                facts["num_words"].
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
        self._num_chosen = max(1, round(mask_fraction * sequence_length))
        self._mask = len(vocabulary)
        counts = torch.cat([vocabulary.word_counts, vocabulary.word_counts.new_zeros(1)])
        self.facts = {"num_words": self._mask + 1, "word_counts": counts}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        words = self._samples[index].long()
        chosen = torch.randperm(len(words))[: self._num_chosen]
        targets = torch.full_like(words, NOT_COUNTED)
        targets[chosen] = words[chosen]
        draw = torch.rand(len(chosen))
        others = torch.randint(self._mask, (len(chosen),))
        shown = torch.where(draw < _MASKED + _RANDOM, others, words[chosen])
        words[chosen] = shown.masked_fill(draw < _MASKED, self._mask)
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
