"""The largest magnitudes of one tensor, or of each of several, exactly. Ties go to the lower index.

Shapes: N elements of one flattened tensor; K entries, of T tensors one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from parsimony_kernels.runtime.transfer import upload


def largest_indices(magnitude_N: Tensor, k: int, num_nonzero: int | None = None) -> Tensor:
    """Return the ascending indices of the k largest magnitudes that are not zero; ties by index.

    num_nonzero: how many are not zero. Without it, a GPU is waited for. There is no NaN then.
    """
    if num_nonzero is not None:
        return _known_number_of_largest(magnitude_N, min(k, num_nonzero))
    if k >= magnitude_N.numel():
        return magnitude_N.nonzero().view(-1)
    kth = magnitude_N.topk(k, sorted=False).values.min()
    above = (magnitude_N > kth).nonzero().view(-1)
    if kth == 0:
        return above
    ties = (magnitude_N == kth).nonzero().view(-1)[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _known_number_of_largest(magnitude_N: Tensor, k: int) -> Tensor:
    """Return the ascending indices of the k largest, ties by index; k are not 0."""
    numbers = torch.arange(magnitude_N.numel(), device=magnitude_N.device)
    if k == 0:
        return numbers[:0]
    kth = magnitude_N.topk(k, sorted=False).values.min()
    is_above, is_tie = magnitude_N > kth, magnitude_N == kth
    is_chosen = is_above | (is_tie & (is_tie.cumsum(0) <= k - is_above.sum()))
    # Where each of the chosen goes; all others go behind them.
    slots = (is_chosen.cumsum(0) - 1).masked_fill(~is_chosen, k)
    return (
        torch.empty_like(numbers[: k + 1]).scatter_(0, slots, numbers)[:k]
        if (k < numbers.numel())
        else numbers
    )


def mark_largest(
    magnitudes_K: Tensor, counts: Sequence[int], wanted: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mark the largest of each of T tensors, ties by position; waits for no GPU.

    Args: magnitudes_K: `counts` of each tensor, one after the other; none is 0. wanted: how many of
            each, at least 1.
    Returns: (K,) whether it is among them; and the least magnitude that is, (T,).
    """
    if magnitudes_K.device.type == "cpu":
        return _mark_one_by_one(magnitudes_K, counts, wanted)
    return _mark_together(magnitudes_K, counts, wanted)


def _mark_one_by_one(
    magnitudes_K: Tensor, counts: Sequence[int], wanted: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Do what `mark_largest` says on a CPU; numpy takes a fraction of torch's time for so few."""
    is_largest_K, least = numpy.ones(magnitudes_K.numel(), bool), []
    ends = list(itertools.accumulate(counts))
    for end, count, want in zip(ends, counts, wanted, strict=True):
        part = magnitudes_K.numpy()[end - count : end]
        kth = numpy.partition(part, count - want)[count - want]
        least.append(kth)
        if want < count:
            is_largest = part >= kth
            ties = numpy.flatnonzero(part == kth)
            too_many = numpy.count_nonzero(is_largest) - want
            is_largest[ties[len(ties) - too_many :]] = False
            is_largest_K[end - count : end] = is_largest
    return torch.from_numpy(is_largest_K), torch.from_numpy(numpy.array(least))


def _mark_together(
    magnitudes_K: Tensor, counts: Sequence[int], wanted: Sequence[int]
) -> tuple[Tensor, Tensor]:
    device, ends = magnitudes_K.device, list(itertools.accumulate(counts))
    limits = [end - count + want for end, count, want in zip(ends, counts, wanted, strict=True)]
    ends_T, limits_T = upload(torch.tensor([ends, limits], device="cpu"), device)
    numbers_K = torch.arange(magnitudes_K.numel(), device=device)
    tensor_K = torch.bucketize(numbers_K, ends_T, right=True)
    order_K = magnitudes_K.sort(descending=True, stable=True).indices
    order_K = order_K[tensor_K[order_K].sort(stable=True).indices]
    is_largest_K = torch.empty_like(order_K, dtype=torch.bool)
    is_largest_K[order_K] = numbers_K < limits_T[tensor_K]
    return is_largest_K, magnitudes_K[order_K[limits_T - 1]]


def split_marked(is_marked_K: Tensor, num_marked: int) -> tuple[Tensor, Tensor]:
    """Return the ascending positions of the marked, and of the others. Waits for no GPU."""
    if is_marked_K.device.type == "cpu":
        marks = is_marked_K.numpy()
        marked, others = (torch.from_numpy(numpy.flatnonzero(each)) for each in (marks, ~marks))
        return marked, others
    order = (~is_marked_K).to(torch.uint8).sort(stable=True).indices
    return order[:num_marked], order[num_marked:]
