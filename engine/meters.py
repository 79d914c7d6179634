"""Sums of a run: losses and accuracies over samples, seconds over phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.interfaces import Comm


class AccuracyMeter:
    """Loss and top-k accuracy over samples, summed exactly over ranks."""

    def __init__(self, top_k: Sequence[int], device: torch.device) -> None:
        self._top_k = tuple(top_k)
        self.sums = torch.zeros(2 + len(self._top_k), dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor, mean_loss: Tensor) -> None:
        """Add a batch: logits (batch, classes), labels (batch,) of class numbers."""
        num_samples = len(labels)
        best = logits.topk(min(max(self._top_k), logits.shape[1]), dim=1).indices
        hits = best == labels.unsqueeze(1)
        counts = [hits[:, :k].sum() for k in self._top_k]
        self.sums += torch.stack(
            [
                torch.as_tensor(num_samples, device=self.sums.device),
                mean_loss.float() * num_samples,
                *counts,
            ]
        ).double()

    def reduce(self, comm: Comm, split: str) -> dict[str, float]:
        """Return the means over all ranks' samples, accuracies in percent. A collective."""
        sums = comm.all_reduce_async(self.sums.clone(), f"metrics.{split}").wait().tolist()
        num_samples, loss, *hits = sums
        metrics = {f"loss/{split}": loss / num_samples}
        for k, hit in zip(self._top_k, hits, strict=True):
            metrics[f"acc/{split}_top{k}"] = 100 * hit / num_samples
        return metrics


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to a phase. On a GPU: of its launch, not of its run."""
    start = time.perf_counter()
    yield
    add_seconds(seconds, phase, time.perf_counter() - start)


def add_seconds(seconds: dict[str, float], phase: str, more: float) -> None:
    seconds[phase] = seconds.get(phase, 0.0) + more
