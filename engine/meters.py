"""Sums of a run: those of its task over samples, seconds over phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.interfaces import Comm


class Sums:
    """What a task adds up over batches, kept in float64 and added up over ranks."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self.values = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def add(self, sums: Tensor) -> None:
        self.values += sums

    def reduce(self, comm: Comm, name: str) -> list[float]:
        """Return the sums over all ranks. A collective."""
        return comm.all_reduce_async(self.values.clone(), f"metrics.{name}").wait().tolist()


def smaller_is_better(metric: str) -> bool:
    """Tell whether a metric of this name, e.g. "perplexity/valid", is better the smaller."""
    return metric.startswith(("loss", "perplexity"))


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to a phase. On a GPU: of its launch, not of its run."""
    start = time.perf_counter()
    yield
    add_seconds(seconds, phase, time.perf_counter() - start)


def add_seconds(seconds: dict[str, float], phase: str, more: float) -> None:
    seconds[phase] = seconds.get(phase, 0.0) + more
