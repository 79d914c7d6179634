"""Which entries of a residual to send: how many, above which threshold, at which indices.

A threshold is carried from step to step and steered: the pass that adds the gradient takes out what
reaches it, and counts. Only where far too few do, or more than there is room for, is the residual
looked through again. Small tensors are ranked. steering.py chooses the next threshold.
Refuses: choosing by position. An entry is left out only because a larger one was there.
Source: Lin et al. 2018 (arXiv:1712.01887). Differs: their threshold comes from a new sample in
every step.
Shapes: N elements of one flattened tensor, K selected of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dgc.selection.histogram import Tail
from dgc.selection.plan import SparsityPlan
from dgc.selection.steering import Steering
from dgc.worker.residual import Compensation, Taken
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report, Selection

MAX_TRIES = 5  # passes over a residual in a step, before it is ranked


class Selector:
    """Chooses one tensor's entries, step by step.

    A step is: `begin`, the pass over the gradient with the selection that it returns, `settle`,
    then `end_step`. Counts average to the plan's k: what one step sent beyond it, or
    less, the next ones make up for.
    """

    def __init__(self, plan: SparsityPlan) -> None:
        self._steering = Steering()
        self._plan = plan
        self._next: Steering | None = None

    @property
    def steering(self) -> Steering:
        return self._steering.for_plan(self._plan)

    @property
    def threshold(self) -> float:
        """Of the next pass; inf before the first step."""
        return self.steering.threshold

    @property
    def plan(self) -> SparsityPlan:
        return self._plan

    @plan.setter
    def plan(self, plan: SparsityPlan) -> None:
        """Go on with another plan, between steps; the threshold stays as what to start from."""
        if plan.numel != self._plan.numel:
            raise ValueError(f"plan is for {plan.numel} elements; allowed: {self._plan.numel}")
        self._plan = plan

    def begin(self, step: int) -> Selection | None:
        """Return what the pass over this step's last gradient shall take out; None if nothing.

        Args: step: any number that changes from step to step: which blocks are sampled.
        """
        return None if self.plan.is_exact else self.selection(self.threshold, step)

    def selection(self, threshold: float, step: int) -> Selection:
        every = self.plan.sample_every
        return Selection(
            threshold, self.plan.capacity, sample_every=every, sample_first=step * _STRIDE % every
        )

    def settle(self, found: Found, report: Report, compensation: Compensation, name: str) -> Taken:
        """Return the step's entries, which are then out of the residual, given what a pass found.

        What was found, if its number is within `Steering.bounds`. Of more, the largest, ties by
        index; the others are put back. With fewer, or more than fit in a list, the residual is
        looked through again; if MAX_TRIES passes do not do, it is ranked. Too few are left only if
        no more are other than 0.
        Args: found, report: of the pass with `begin`'s selection, the step's last over this tensor.
        Cost: neither a pass nor a host sync in the steady state; one sync where entries are put
            back, one pass and two syncs for each further try.
        """
        if self.plan.is_exact or report.histogram is None:
            return self.take_largest(compensation, name)
        tail = Tail(report.histogram, self.plan.sample_every)
        taken, cut = _Search(self, compensation, name, tail).run(found, report.count)
        count = taken.indices_K.numel()
        self._next = self.steering.after(self.plan, tail, report.count, cut, count)
        return taken

    def take_largest(self, compensation: Compensation, name: str) -> Taken:
        """Take the plan's k largest entries by ranking all; ties by index."""
        magnitude_N = buffers.decode(compensation.residual[name]).abs()
        return compensation.take_exactly(name, largest_indices(magnitude_N, self.plan.k))

    def end_step(self, stands: bool) -> None:
        """Go on with the next threshold if the step stands; else forget it."""
        if stands:
            self._steering = self._next or self._steering
        self._next = None

    def state(self) -> Tensor:
        """Return what `load` takes, between steps: (6,) float64."""
        return self._steering.to_tensor()

    @staticmethod
    def merged(states: Sequence[Tensor], scale: float) -> Tensor:
        """Return a `state` that starts from the mean of the states' thresholds, times scale."""
        return Steering.merged(map(Steering.from_tensor, states), scale).to_tensor()

    @staticmethod
    def check(state: Tensor) -> None:
        """Raises: ValueError for a tensor that is no `state`, by its shape."""
        if state.shape != (6,):
            raise ValueError(f"state has shape {tuple(state.shape)}; allowed: (6,), a state()")

    def load(self, state: Tensor) -> None:
        """Go on from a `state`. Raises: ValueError: see `check`."""
        self.check(state)
        self._steering, self._next = Steering.from_tensor(state), None


_STRIDE = 7919  # a prime: the sampled blocks differ from step to step, and all have their turn


class _Search:
    """One step's way to a count within bounds, from pass to pass."""

    def __init__(
        self, selector: Selector, compensation: Compensation, name: str, tail: Tail
    ) -> None:
        self.selector, self.plan, self.tail = selector, selector.plan, tail
        self.compensation, self.name = compensation, name
        self.bounds = selector.steering.bounds(selector.plan)
        # Thresholds that too many, or too few, entries reach.
        self.too_low, self.too_high = 0.0, math.inf

    def run(self, found: Found, count: int) -> tuple[Taken, float]:
        """Return what is taken out, and the threshold above which that is all there was."""
        fewest, _, most = self.bounds
        threshold, taken = self.selector.threshold, None
        for _ in range(MAX_TRIES):
            new = Taken(*found.entries(count))
            if count > self.plan.capacity:
                # The list overflowed: which entries are in it depends on threads.
                self._put_back(new)
                self.too_low = threshold
            else:
                taken = new if taken is None else _join(taken, new)
                if taken.indices_K.numel() > most:
                    return self._largest_of(taken)
                if taken.indices_K.numel() >= fewest or threshold == 0:
                    return taken, threshold
                self.too_high = threshold
            if self.too_high <= self.too_low * (1 + 1e-6):
                break  # only equal magnitudes lie between the two
            threshold = self._next_threshold(0 if taken is None else taken.indices_K.numel())
            selection = self.selector.selection(threshold, 0)
            found = self.compensation.select_again(self.name, selection)
            count = buffers.read_reports([found])[0].count
        else:
            self._put_back(Taken(*found.entries(count)))
        if taken is not None:
            self._put_back(taken)
        taken = self.selector.take_largest(self.compensation, self.name)
        return taken, _least(taken)

    def _next_threshold(self, count: int) -> float:
        """Return where enough should be, `count` being above the one that is too high."""
        threshold = self.tail.threshold(self.bounds[1], self.too_high, count)
        if self.too_low < threshold < self.too_high:
            return threshold
        if self.too_high == math.inf:
            return 2 * self.too_low
        return math.sqrt(self.too_low * self.too_high)  # 0 as long as no threshold was too low

    def _largest_of(self, taken: Taken) -> tuple[Taken, float]:
        is_kept = torch.zeros_like(taken.indices_K, dtype=torch.bool)
        is_kept[largest_indices(taken.values_K.abs(), self.bounds[1])] = True
        self._put_back(taken.where(~is_kept))
        kept = taken.where(is_kept)
        return kept, _least(kept)

    def _put_back(self, taken: Taken) -> None:
        self.compensation.put_back(self.name, taken)


def _least(taken: Taken) -> float:
    """Return the least magnitude that was taken; 0 if none was."""
    return taken.values_K.abs().min().item() if taken.indices_K.numel() else 0.0


def _join(one: Taken, other: Taken) -> Taken:
    indices_K, order = torch.cat([one.indices_K, other.indices_K]).sort()
    values_K = torch.cat([one.values_K, other.values_K])[order]
    if one.velocities_K is None or other.velocities_K is None:
        return Taken(indices_K, values_K, None)
    return Taken(indices_K, values_K, torch.cat([one.velocities_K, other.velocities_K])[order])


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
