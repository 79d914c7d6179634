"""Tasks: what a model is trained for. A task computes a batch's loss and the metrics of many.

A task is called with a model, a batch, and the state that the batch before has left; it returns
the mean loss, sums over the batch in float64, and the state for the next batch. The protocol is
engine.interfaces.Task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NOT_COUNTED = -100
"""The target of a position where nothing is to be predicted; torch's losses ignore it."""


class Classification:
    """Predict one of several classes for each sample of a batch (inputs (B, ...), labels (B,)).

    Args: loss: of logits (B, classes) and labels. top_k: for each k, report how often the label is
        among the k best classes.
    """

    def __init__(self, loss: nn.Module, top_k: Sequence[int] = (1, 5)) -> None:
        self._loss, self._top_k = loss, tuple(top_k)
        self.num_sums = 2 + len(self._top_k)

    def __call__(
        self, model: nn.Module, batch: Sequence[Tensor], carried: Any
    ) -> tuple[Tensor, Tensor, None]:
        inputs, labels = batch
        logits = model(inputs)
        loss = self._loss(logits, labels)
        with torch.no_grad():
            best = logits.topk(min(max(self._top_k), logits.shape[1]), dim=1).indices
            hits = best == labels.unsqueeze(1)
            sums = [torch.as_tensor(len(labels), device=loss.device), loss.float() * len(labels)]
            sums += [hits[:, :k].sum() for k in self._top_k]
            return loss, torch.stack(sums).double(), None

    def metrics(self, sums: Sequence[float], split: str) -> dict[str, float]:
        """Return the mean loss, and accuracies in percent."""
        num_samples, loss, *hits = sums
        num_samples = num_samples or math.nan  # 0 if every step was undone
        accuracies = {
            f"acc/{split}_top{k}": 100 * hit / num_samples
            for k, hit in zip(self._top_k, hits, strict=True)
        }
        return {f"loss/{split}": loss / num_samples, **accuracies}


class LanguageModelling:
    """Predict the next word, with a model called with (words (T, B), targets (T, B), state).

    The model returns the mean loss of a target, and the state for the next batch.
    """

    num_sums = 2

    def __call__(
        self, model: nn.Module, batch: Sequence[Tensor], carried: Any
    ) -> tuple[Tensor, Tensor, Any]:
        words, targets = batch
        loss, state = model(words, targets, carried)
        return loss, _loss_sums(loss, targets), state

    def metrics(self, sums: Sequence[float], split: str) -> dict[str, float]:
        return _loss_and_perplexity(sums, split)


class MaskedLanguageModelling:
    """Predict masked words, with a model called with (words (B, T), targets (B, T)).

    Source: Devlin et al. 2019 (arXiv:1810.04805), without their second task.
    """

    num_sums = 2

    def __call__(
        self, model: nn.Module, batch: Sequence[Tensor], carried: Any
    ) -> tuple[Tensor, Tensor, None]:
        words, targets = batch
        loss = model(words, targets)
        return loss, _loss_sums(loss, targets), None

    def metrics(self, sums: Sequence[float], split: str) -> dict[str, float]:
        return _loss_and_perplexity(sums, split)


def _loss_sums(loss: Tensor, targets: Tensor) -> Tensor:
    """Return (2,): the number of targets other than -100, and the sum of their losses."""
    num_targets = (targets != NOT_COUNTED).sum()
    # without targets the mean loss is 0 / 0
    total = torch.where(num_targets > 0, loss.detach().double() * num_targets, 0.0)
    return torch.stack([num_targets.double(), total])


def _loss_and_perplexity(sums: Sequence[float], split: str) -> dict[str, float]:
    """Return the mean loss, and in evaluation the perplexity, its exponential."""
    num_targets, total = sums
    loss = total / (num_targets or math.nan)  # 0 if every step was undone
    metrics = {f"loss/{split}": loss}
    if split != "train":  # a sampled softmax has another loss in training
        metrics[f"perplexity/{split}"] = math.exp(loss) if loss < 700 else math.inf
    return metrics
