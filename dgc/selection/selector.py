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
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgc.selection.histogram import Tail
from dgc.selection.plan import SparsityPlan
from dgc.selection.ranking import largest_indices, mark_largest, split_marked
from dgc.selection.steering import Steering
from dgc.worker.residual import Compensation
from dgc.worker.taken import Taken
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report, Selection

MAX_TRIES = 5  # passes over a residual in a step, before it is ranked

Settling = Generator[Found, Report, Taken]


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
        self._ending: _Ending | None = None  # of the step under way, until its cut is known

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

    def num_leaving(self, report: Report) -> int | None:
        """Return how many of the entries that a pass has listed leave: all, or the largest so many.

        None where that takes more than the list: see `settling`.
        """
        if self.plan.is_exact or report.histogram is None:
            return None
        fewest, reduced, most = self.steering.bounds(self.plan)
        is_enough = report.count >= fewest or self.threshold == 0
        if not is_enough or report.count > self.plan.capacity:
            return None
        return report.count if report.count <= most else reduced

    def note(self, report: Report, num_taken: int, cut: float | Tensor) -> None:
        """Take in that so many leave, all above `cut`, which may be on a device."""
        tail = Tail(report.histogram, self.plan.sample_every)
        self._ending = _Ending(tail, report.count, cut, num_taken)
        if not isinstance(cut, Tensor) or cut.device.type == "cpu":
            self.tell_cut(float(cut))

    def settle(self, found: Found, report: Report, compensation: Compensation, name: str) -> Taken:
        """Do what `settling` says, waiting by itself for each further pass."""
        way = self.settling(found, report, compensation, name)
        try:
            again = next(way)
            while True:
                again = way.send(buffers.read_reports([again])[0])
        except StopIteration as end:
            return end.value

    def settling(
        self,
        found: Found,
        report: Report,
        compensation: Compensation,
        name: str,
        num_nonzero: int | None = None,
    ) -> Settling:
        """Return the step's entries, which are then out of the residual, given what a pass found.

        What was found, if its number is within `Steering.bounds`. Of more, the largest, ties by
        index; the others are put back. With fewer, or more than fit in a list, the residual is
        looked through again; if MAX_TRIES passes do not do, it is ranked. Too few are left only if
        no more are other than 0.
        Args: found, report: of the pass with `begin`'s selection, the step's last over this tensor.
            num_nonzero: entries of the residual that are not 0, where the tensor is ranked and that
            is known: then a GPU is not waited for.
        Yields: what another pass has found; it is to be sent the pass's report.
        Cost: no pass in the steady state. Waits for a GPU only where so many passes found too few
            that the residual is ranked.
        """
        if self.plan.is_exact or report.histogram is None:
            return self.take_largest(compensation, name, num_nonzero)
        tail = Tail(report.histogram, self.plan.sample_every)
        search = _Search(self, compensation, name, tail)
        taken, cut = yield from search.run(found, report.count)
        self.note(report, taken.indices_K.numel(), cut)
        return taken

    def take_largest(
        self, compensation: Compensation, name: str, num_nonzero: int | None = None
    ) -> Taken:
        """Take the plan's k largest entries by ranking all; ties by index."""
        magnitude_N = buffers.decode(compensation.residual[name]).abs()
        chosen = largest_indices(magnitude_N, self.plan.k, num_nonzero)
        return compensation.take_exactly(name, chosen)

    @property
    def open_cut(self) -> Tensor | None:
        """(): the cut of the step under way, if it is still on a device; for `tell_cut`."""
        return None if self._ending is None else self._ending.cut

    def tell_cut(self, cut: float) -> None:
        """Take the number that `open_cut` is. Before `end_step`."""
        ending, self._ending = self._ending, None
        self._next = self.steering.after(
            self.plan, ending.tail, ending.num_met, cut, ending.num_taken
        )

    def end_step(self, stands: bool) -> None:
        """Go on with the next threshold if the step stands; else forget it."""
        if stands:
            self._steering = self._next or self._steering
        self._next = self._ending = None

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


class _Ending(NamedTuple):
    """What `Steering.after` is to be given of a step."""

    tail: Tail
    num_met: int
    cut: float | Tensor
    num_taken: int


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

    def run(
        self, found: Found, count: int
    ) -> Generator[Found, Report, tuple[Taken, float | Tensor]]:
        """Return what is taken out, and the threshold above which that is all there was, which may
        be on a device. Yields what further passes found, and is sent their reports."""
        fewest, _, most = self.bounds
        threshold, taken = self.selector.threshold, None
        for _ in range(MAX_TRIES):
            new = _entries(found, count)
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
            count = (yield found).count
        else:
            self._put_back(_entries(found, count))
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

    def _largest_of(self, taken: Taken) -> tuple[Taken, Tensor]:
        _, reduced, _ = self.bounds
        is_kept_K, least = mark_largest(taken.values_K.abs(), [taken.indices_K.numel()], [reduced])
        kept, rest = split_marked(is_kept_K, reduced)
        self._put_back(taken.where(rest))
        return taken.where(kept), least[0]

    def _put_back(self, taken: Taken) -> None:
        self.compensation.put_back(self.name, taken)


def _entries(found: Found, count: int) -> Taken:
    indices_K, values_K, velocities_K = found.entries(count)
    return Taken(indices_K - found.first if found.first else indices_K, values_K, velocities_K)


def _least(taken: Taken) -> Tensor:
    """Return the least magnitude that was taken, (); 0 if none was."""
    if taken.indices_K.numel() == 0:
        return taken.values_K.new_zeros(())
    return taken.values_K.abs().min()


def _join(one: Taken, other: Taken) -> Taken:
    indices_K, order = torch.cat([one.indices_K, other.indices_K]).sort()
    values_K = torch.cat([one.values_K, other.values_K])[order]
    if one.velocities_K is None or other.velocities_K is None:
        return Taken(indices_K, values_K, None)
    return Taken(indices_K, values_K, torch.cat([one.velocities_K, other.velocities_K])[order])
