"""What a run adds up: sums of its task over batches, and seconds over the phases of its steps."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from engine.interfaces import Collectives


class Sums:
    """A task's sums over this rank's batches, in float64; `reduce` adds those of all ranks."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        self.values = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def add(self, sums: Tensor) -> None:
        self.values += sums

    def reduce(self, comm: Collectives, name: str) -> list[float]:
        """Return the sums over all ranks. A collective."""
        return comm.all_reduce_async(self.values.clone(), f"metrics.{name}").wait().tolist()


def smaller_is_better(metric: str) -> bool:
    """Tell whether the smaller value of this metric, e.g. "perplexity/valid", is the better one."""
    return metric.startswith(("loss", "perplexity"))


class Stopwatch:
    """Adds the wall time of consecutive phases to `seconds`: phase -> seconds.

    On a GPU this is the time to launch the work, not to run it.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def end(self, phase: str) -> None:
        """Add the time since the last phase ended to this one."""
        now = time.perf_counter()
        add_seconds(self._seconds, phase, now - self._last)
        self._last = now


def add_seconds(seconds: dict[str, float], phase: str, more: float) -> None:
    seconds[phase] = seconds.get(phase, 0.0) + more
