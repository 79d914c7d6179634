"""How many entries of a tensor to select, and how: by ranking them all, or by a threshold.

Depends on sizes and settings alone, so that all ranks plan alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parsimony_kernels.buffers.operands import BLOCK

_LEAST_CAPACITY = 1024
_SAMPLED_ABOVE = 128  # entries above the threshold that are wanted in the sampled blocks
# Counts up to three standard deviations (of a count whose mean is k) from k are let pass whatever
# the tolerance is: the next steps make up for them.
_DEVIATIONS = 3


@dataclass(frozen=True)
class SparsityPlan:
    """How to select from a tensor of `numel` elements.

    k: entries aimed at. is_exact: the k largest, by ranking. Else by threshold: k_bounds: counts
    between these are sent as they are; capacity: the most that a pass lists; sample_every: one
    block in so many enters the histogram.
    """

    numel: int
    k: int
    is_exact: bool
    k_bounds: tuple[int, int]
    capacity: int
    sample_every: int


def plan_sparsity(
    numel: int,
    density: float,
    *,
    k_tolerance: tuple[float, float] = (0.8, 1.3),
    exact_below: int = 8192,
) -> SparsityPlan:
    """Plan the selection of `density * numel` entries, at least one.

    Exact for tensors of fewer than `exact_below` elements, and where a quarter or more is sent.
    Example: numel=10_000_000, density=0.001 -> k=10_000, bounds 8_000 to 13_000, room for 80_000,
        one block in 78 sampled.
    """
    k = max(1, math.ceil(numel * density))
    noise = math.ceil(_DEVIATIONS * math.sqrt(k))
    fewest = max(1, min(math.ceil(k * k_tolerance[0]), k - noise))
    most = min(numel, max(math.floor(k * k_tolerance[1]), k + noise))
    return SparsityPlan(
        numel=numel,
        k=k,
        is_exact=numel < exact_below or 4 * k >= numel,
        k_bounds=(fewest, most),
        capacity=min(numel, max(_LEAST_CAPACITY, most, 2 * k, min(8 * k, numel // 16))),
        sample_every=max(1, min(k // _SAMPLED_ABOVE, numel // BLOCK)),
    )
