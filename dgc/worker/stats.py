"""What this rank's part of an exchange came to: bytes, counts, seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgc.worker.taken import TakenTogether
from parsimony_kernels.runtime.transfer import upload


class _Timed:
    """A context, in a third of the time of contextlib's: one for each gradient."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            spent = time.perf_counter() - self._start
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent


@dataclass
class StepStats:
    """What this rank's part of the last exchange came to.

    Bytes are those handed to the collectives, each counted once. seconds: wall time by phase; of
    compensate, select and pack, what happens in the hooks of backward; wait: standing still for
    others; merge; optimizer.
    """

    sparse_bytes: int = 0
    dense_bytes: int = 0
    row_bytes: int = 0
    """Of row-sparse gradients."""
    statistics_bytes: int = 0
    """Of shared second moments."""
    island_bytes: int = 0
    """Within an island of ranks, in two levels; not part of the payload, which is what leaves."""
    num_selected: int = 0
    """Entries that reached the others."""
    num_selectable: int = 0
    least_taken: dict[str, Tensor] = field(default_factory=dict)
    """By tensor: the least magnitude that was taken out of the residual; on its device."""
    in_flight_seconds: float = 0.0
    """From the first collective's start to the last one's end."""
    gradient_norms: list[Tensor] = field(default_factory=list)
    """What `gradient_norm` is of: by tensor and micro-batch, or of all; on their devices."""
    clip_factors: list[Tensor] = field(default_factory=list)
    norm_of_residual: Callable[[], float] = lambda: 0.0
    skipped: str | None = None
    """Why the step was undone on all ranks; None: it was not."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes that left this rank, or in two levels its island."""
        return self.sparse_bytes + self.dense_bytes + self.row_bytes + self.statistics_bytes

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Return the bytes of each kind of which there are any."""
        kinds = ("sparse", "dense", "row", "statistics", "island")
        found = {kind: getattr(self, f"{kind}_bytes") for kind in kinds}
        return {kind: count for kind, count in found.items() if count}

    @property
    def gradient_norm(self) -> float | None:
        """The 2-norm of this rank's gradient before clipping; None where clip_norm is not set.

        Of several micro-batches, each of which is clipped as it comes: the root of the sum of their
        squared norms. Waits for a GPU.
        """
        return math.hypot(*map(float, self.gradient_norms)) if self.gradient_norms else None

    @property
    def clip_factor(self) -> float | None:
        """The least factor by which clipping multiplied a gradient, 1 if none was clipped; None
        where clip_norm is not set. Waits for a GPU."""
        return min(map(float, self.clip_factors)) if self.clip_factors else None

    @property
    def residual_norm(self) -> float:
        """The 2-norm of what this rank has not sent yet; reads all of it when it is asked for."""
        return self.norm_of_residual()

    @property
    def thresholds(self) -> dict[str, float]:
        """Return `least_taken` as numbers. Waits for a GPU."""
        return {name: float(least) for name, least in self.least_taken.items()}

    @property
    def hidden_share(self) -> float:
        """Return the share of the time in flight in which this rank had other things to do."""
        if not self.in_flight_seconds:
            return 1.0
        return max(0.0, 1.0 - self.seconds.get("wait", 0.0) / self.in_flight_seconds)

    def note_taken(self, entries: TakenTogether, num_selectable: int) -> None:
        """Take in what is on its way out of residuals, of tensors of so many elements."""
        self.num_selected += entries.positions_K.numel()
        self.num_selectable += num_selectable
        there = [place for place in entries.places if place.count]
        if there:
            counts = torch.tensor([place.count for place in there], device="cpu")
            least_T = torch.segment_reduce(
                entries.values_K.abs(), "min", lengths=upload(counts, entries.values_K.device),
                unsafe=True,
            )  # fmt: skip
            names = (place.name for place in there)
            self.least_taken |= zip(names, least_T.unbind(), strict=True)

    def timed(self, phase: str) -> _Timed:
        """Add the wall time of the block to a phase. On a GPU: of its launch, not of its run."""
        return _Timed(self.seconds, phase)

    def timing(self, phase: str, way: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Do what a generator does, and add its own wall time to a phase."""
        sent = None
        while True:
            with self.timed(phase):
                try:
                    asked = way.send(sent)
                except StopIteration as end:
                    return end.value
            sent = yield asked
