"""The methods that language_model.py compares: optimizer, clipping, and rates to try."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from benchmarks.contenders import ALL, OURS
from benchmarks.words import WordModel

NOTHING = 2**62  # more elements than a tensor has


@dataclass(frozen=True)
class Method:
    """How an optimizer is used. The paper's rates are 0.001 for Adam and 2.5 for momentum."""

    rates: tuple[float, ...]  # for `--scale short`
    clip: float = 1.0  # bound of the norm of all gradients, as in the paper
    words_only: bool = False  # as in the paper, the LSTM has full state


ADAM_RATES = (3e-3, 1e-2, 3e-2)
METHODS = {
    "Adam": Method(ADAM_RATES),
    "Adam, full, ours": Method(ADAM_RATES),  # what row-sparse gradients do by themselves
    "CS-MV": Method(ADAM_RATES, words_only=True),
    "CS-V": Method(ADAM_RATES, words_only=True),
    "CMS, beta1 = 0": Method(ADAM_RATES, words_only=True),
    "FactoredAdam": Method(ADAM_RATES),
    "FactoredAdam, beta1 = 0": Method(ADAM_RATES),
    "SM3Adam": Method((1e-2, 3e-2, 1e-1)),
    "SM3, momentum 0.9": Method((0.03, 0.1, 0.3)),
    "torch Adafactor": Method((0.03, 0.1, 0.3)),
    "CAME": Method((3e-4, 1e-3, 3e-3)),
    "8-bit Adam": Method(ADAM_RATES),
    "momentum": Method((2.5, 5.0, 10.0), clip=0.25),
    "CS-momentum": Method((2.5, 5.0, 10.0, 20.0), clip=0.25, words_only=True),
}


def takes_row_sparse(name: str) -> bool:
    return name in OURS


def make_optimizer(name: str, model: WordModel, lr: float) -> Optimizer:
    if not METHODS[name].words_only:
        return ALL[name](model.parameters(), lr)
    words = [*model.embedding.parameters(), *model.softmax.parameters()]
    recurrent = {"params": list(model.recurrent.parameters()), "min_compressed_numel": NOTHING}
    return ALL[name]([{"params": words}, recurrent], lr)
