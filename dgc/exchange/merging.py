"""Several senders' entries to one sum, in rank order, so that every rank has the same bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dgc.wire.entries import Entries
from parsimony_kernels.packing import ops as packing


def merge_in_rank_order(entries: Sequence[Entries], dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return the positions, ascending, and the sums of their values: the same bits on every rank.

    Example: {2: 1.0, 5: 3.0} and {5: 1.0} -> {2: 1.0, 5: 4.0}.
    """
    return packing.merge([e.positions_K for e in entries], [e.values_M for e in entries], dim)


def at_rest(entries: Sequence[Entries]) -> set[int]:
    """Return the numbers of the tensors that rest at all of the senders."""
    return set.intersection(*(set(part.resting) for part in entries))
