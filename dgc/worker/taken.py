"""Entries that are out of residuals: of one tensor, or of a bucket's, which go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Taken:
    """Entries that are out of a residual, and of the velocity if that is masked.

    indices_K (K,) int64, ascending and unique; values_K, velocities_K (K,) float32 or float64.
    """

    indices_K: Tensor
    values_K: Tensor
    velocities_K: Tensor | None

    def where(self, mask_K: Tensor) -> Taken:
        """Return some of the entries."""
        velocities_K = None if self.velocities_K is None else self.velocities_K[mask_K]
        return Taken(self.indices_K[mask_K], self.values_K[mask_K], velocities_K)

    def at(self, name: str, first: int) -> TakenTogether:
        """Return the same as entries of a bucket in which the tensor begins at `first`."""
        place = Place(name, self.indices_K.numel(), first)
        positions_K = self.indices_K + first if first else self.indices_K
        return TakenTogether([place], positions_K, self.values_K, self.velocities_K)


class Place(NamedTuple):
    """Where one tensor's entries are among a bucket's: the next `count` are of this tensor, whose
    indices are their positions less `first`."""

    name: str
    count: int
    first: int


@dataclass(frozen=True)
class TakenTogether:
    """Entries of several tensors, one tensor after the other.

    positions_K (K,) int64 count through the tensors of a bucket as if they were joined; values_K,
    velocities_K as those of Taken. places: whose they are, in order.
    """

    places: list[Place]
    positions_K: Tensor
    values_K: Tensor
    velocities_K: Tensor | None

    def where(self, mask_K: Tensor) -> TakenTogether:
        """Return some of the entries. Waits for a GPU."""
        counts = [int(mask.sum()) for mask in mask_K.split([place.count for place in self.places])]
        places = [p._replace(count=count) for p, count in zip(self.places, counts, strict=True)]
        parts = (self.positions_K, self.values_K, self.velocities_K)
        return TakenTogether(places, *(None if part is None else part[mask_K] for part in parts))

    def split(self) -> Iterator[TakenTogether]:
        """Return each tensor's entries, of those that have any."""
        for place, span in spans(self.places):
            velocities_K = None if self.velocities_K is None else self.velocities_K[span]
            yield TakenTogether([place], self.positions_K[span], self.values_K[span], velocities_K)

    def by_tensor(self) -> Iterator[tuple[str, Taken]]:
        """Return each tensor's entries with its own indices, of those that have any."""
        for part in self.split():
            ((name, _, first),) = part.places
            yield name, Taken(part.positions_K - first, part.values_K, part.velocities_K)


def spans(places: Sequence[Place]) -> Iterator[tuple[Place, slice]]:
    """Return the places that have entries, and where those are."""
    ends = accumulate((place.count for place in places), initial=0)
    for place, (begin, end) in zip(places, pairwise(ends), strict=True):
        if place.count:
            yield place, slice(begin, end)


def join(parts: Sequence[TakenTogether], dtype: torch.dtype, device: torch.device) -> TakenTogether:
    """Join entries whose order is that of their positions. dtype, device: of no parts."""
    if not parts:
        positions_K = torch.zeros(0, dtype=torch.int64, device=device)
        return TakenTogether([], positions_K, positions_K.to(dtype), None)
    velocities = [part.velocities_K for part in parts if part.velocities_K is not None]
    return TakenTogether(
        [place for part in parts for place in part.places],
        torch.cat([part.positions_K for part in parts]),
        torch.cat([part.values_K for part in parts]),
        torch.cat(velocities) if velocities else None,
    )
