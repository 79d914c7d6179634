"""Which entries of a residual to send: how many, above which threshold, at which indices.

Refuses: choosing by position. An entry is left out only because a larger one was there.
Source: Lin et al. 2018 (arXiv:1712.01887), threshold from a sample, with bounded adaptation.
Shapes: N elements of one flattened tensor, K selected of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kernels import buffers
from kernels.operands import Buffer

_LOWERING = 0.8  # factor of a threshold that too few entries reach


@dataclass(frozen=True)
class SparseGrad:
    """Some entries of one flattened tensor of `numel` elements.

    values (K,) floating point; indices (K,) int64, ascending and unique, each below numel.
    """

    values: Tensor
    indices: Tensor
    numel: int


@dataclass(frozen=True)
class SparsityPlan:
    """How to select from a tensor of `numel` elements.

    k: entries aimed at. k_bounds: counts between these are sent as they are.
    num_samples: magnitudes looked at for the threshold; numel means exact selection.
    max_adaptations: times that a threshold may be lowered before the exact selection decides.
    """

    numel: int
    k: int
    k_bounds: tuple[int, int]
    num_samples: int
    max_adaptations: int = 10


def plan_sparsity(
    numel: int,
    density: float,
    *,
    sample_ratio: float = 0.01,
    k_tolerance: tuple[float, float] = (0.8, 1.3),
    max_adaptations: int = 10,
) -> SparsityPlan:
    """Plan the selection of `density * numel` entries, at least one.

    The sample holds at least `sample_ratio` of the tensor and at least 2 / density elements, so
    that two of them are expected above the threshold; a tensor no larger than that is not sampled.
    Example: numel=100_000, density=0.001 -> k=100, bounds 80 to 130, 2,000 samples.
    """
    k = max(1, math.ceil(numel * density))
    num_samples = max(math.ceil(numel * sample_ratio), math.ceil(2 / density))
    bounds = (math.ceil(k * k_tolerance[0]), math.floor(k * k_tolerance[1]))
    return SparsityPlan(numel, k, bounds, min(num_samples, numel), max_adaptations)


def select_largest(residual: Buffer, plan: SparsityPlan, *, generator: Generator) -> Tensor:
    """Return the indices of about `plan.k` entries of largest magnitude.

    Differs from the predecessors' code, which cut an overshoot by position: a count within
    `plan.k_bounds` is sent whole, a larger one is reduced to its k largest, and a count still
    too small after `plan.max_adaptations` gives way to the exact selection. Zeros are never sent.
    Args:    residual: N values, finite, however they are stored; read only.
             generator: chooses the sample; on the residual's device.
    Returns: (K,) int64 ascending. Ties go to the lower index when the selection is exact.
    Cost:    one or two passes over N for each threshold; each ends in a host sync.
    Example: [0.1, -3, 2, 0] with k=2 -> [1, 2].
    """
    if buffers.numel(residual) != plan.numel:
        raise ValueError(f"residual has {buffers.numel(residual)} elements, its plan {plan.numel}")
    if plan.num_samples == plan.numel:
        return largest_indices(buffers.decode(residual).abs(), plan.k)
    threshold = _sampled_threshold(residual, plan, generator)
    fewest, most = plan.k_bounds
    for _ in range(plan.max_adaptations):
        indices_K = buffers.select_above(residual, threshold)
        if indices_K.numel() > most:
            return indices_K[largest_indices(buffers.take(residual, indices_K).abs(), plan.k)]
        if indices_K.numel() >= fewest or threshold == 0:
            return indices_K
        threshold *= _LOWERING
    return largest_indices(buffers.decode(residual).abs(), plan.k)


def _sampled_threshold(residual: Buffer, plan: SparsityPlan, generator: Generator) -> float:
    """Estimate the magnitude that `plan.k` elements reach, from elements drawn with replacement."""
    positions = torch.randint(
        plan.numel, (plan.num_samples,), generator=generator, device=generator.device
    )
    rank = max(1, round(plan.num_samples * plan.k / plan.numel))
    sample = buffers.take(residual, positions).abs()
    return sample.topk(rank, sorted=False).values.min().item()


def largest_indices(magnitude_N: Tensor, k: int) -> Tensor:
    """Return the ascending indices of the k largest magnitudes that are not zero; ties by index."""
    if k >= magnitude_N.numel():
        return magnitude_N.nonzero().view(-1)
    kth = magnitude_N.topk(k, sorted=False).values.min()
    above = (magnitude_N > kth).nonzero().view(-1)
    if kth == 0:
        return above
    ties = (magnitude_N == kth).nonzero().view(-1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values
