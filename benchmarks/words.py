"""WikiText-2 and the count-sketch paper's network for it, which several scripts here train.

Source: Spring et al. 2019, section 5: words -> embedding -> 2-layer LSTM -> full softmax.
Shapes: T positions, B texts side by side; a corpus is cut into B columns and read T rows at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

BPTT = 35  # positions of a batch, through which gradients are propagated back
Hidden = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Corpus:
    """Texts as numbers of words, which are numbered by falling frequency."""

    train: Tensor
    valid: Tensor
    test: Tensor
    num_words: int


def read_corpus(folder: Path, max_words: int) -> Corpus:
    """Read {train,valid,test}.txt; beyond the `max_words` most frequent, words become <unk>."""
    texts = []
    for part in ("train", "valid", "test"):
        path = folder / f"{part}.txt"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; --data takes a folder with WikiText-2 as "
                                    "train.txt, valid.txt and test.txt")  # fmt: skip
        texts.append(path.read_text(encoding="utf-8").replace("\n", " <eos> ").split())
    ranking = [word for word, _ in Counter(texts[0]).most_common(max_words)]
    number = {word: i for i, word in enumerate(ranking)}
    unknown = number["<unk>"]
    return Corpus(*(torch.tensor([number.get(w, unknown) for w in t]) for t in texts), len(ranking))


def batches(text: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (T, B) words and the (T, B) words that follow them."""
    num_rows = len(text) // batch_size
    columns = text[: num_rows * batch_size].view(batch_size, num_rows).t().contiguous()
    for start in range(0, num_rows - 1, BPTT):
        end = min(start + BPTT, num_rows - 1)
        yield columns[start:end], columns[start + 1 : end + 1]


class WordModel(nn.Module):
    """The paper's network, but the softmax's bias starts at the words' log frequencies, not at 0.

    If it starts at 0, the LSTM's outputs serve as a bias until the frequencies are learnt. Adam,
    with any rate at which it learns, soon saturates the LSTM in this way, and the perplexity then
    stays that of the word frequencies for more than 600 steps.
    """

    def __init__(
        self, corpus: Corpus, width: int, dropout: float, sparse_embedding: bool = False
    ) -> None:
        super().__init__()
        num_words = corpus.num_words
        self.embedding = nn.Embedding(num_words, width, sparse=sparse_embedding)
        self.recurrent = nn.LSTM(width, width, num_layers=2, dropout=dropout)
        self.softmax = nn.Linear(width, num_words)
        self.dropout = nn.Dropout(dropout)
        for weight in (self.embedding.weight, self.softmax.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        counts = torch.bincount(corpus.train, minlength=num_words)
        self.softmax.bias.data = (counts / counts.sum()).log()

    def forward(self, words: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Return the logits (T * B, num_words), and the state for the next batch."""
        outputs, hidden = self.recurrent(self.dropout(self.embedding(words)), hidden)
        return self.softmax(self.dropout(outputs)).flatten(0, 1), hidden

    def loss(self, words: Tensor, targets: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Return the mean loss of a word, and the state for the next batch, without gradient."""
        logits, (h, c) = self(words, hidden)
        return nn.functional.cross_entropy(logits, targets.flatten()), (h.detach(), c.detach())


def rate_factor(step: int, num_steps: int) -> float:
    """Return a step's factor of the rate: rising over the first twentieth of the run, then 1, then
    falling to 0 over the last half."""
    done = step / num_steps
    return min(1.0, 20 * (done + 1 / num_steps), 2 * (1 - done))


@torch.no_grad()
def perplexity(model: WordModel, text: Tensor, batch_size: int) -> float:
    """Return exp(mean loss) over the text; inf if that overflows."""
    model.eval()
    hidden, total, count = None, 0.0, 0
    for words, targets in batches(text, batch_size):
        loss, hidden = model.loss(words, targets, hidden)
        total, count = total + float(loss) * targets.numel(), count + targets.numel()
    model.train()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """Coalesce row-sparse gradients; scale all gradients so that their norm is at most max_norm."""
    values = []
    for param in model.parameters():
        if param.grad is not None and param.grad.is_sparse:
            param.grad = param.grad.coalesce()
            values.append(param.grad.values())
        elif param.grad is not None:
            values.append(param.grad)
    norm = torch.nn.utils.get_total_norm(values)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)
