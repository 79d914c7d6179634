"""How a threshold is carried from step to step, so that counts average to what is wanted.

What the next step will find above a threshold t' is estimated by: as many as this step brought
above the last step's cut (all above that had been taken out, so these are one step's arrivals),
which then arrive above this step's cut, and what lies in the residual between that cut and t'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from dgc.selection.histogram import Tail
from dgc.selection.plan import SparsityPlan

MOST_EXCESS = 0.5  # of k: ten steps then average to within 10%
_MADE_UP = 0.5  # the part of the excess that the next step aims to make up for
# Estimates are off by some factor, whose logarithm is averaged. A count that is too small costs a
# pass and one that is too large little: the aim is so many times that above the least allowed.
_SPREAD_GAIN, _SPREADS = 0.2, 3.5
_MOST_SPREAD = 1.0
_MOST_AIM = 2.0  # times k: a quarter or more of what there is room for


@dataclass(frozen=True)
class Steering:
    """What a tensor's control remembers of the steps before. Counts are in entries.

    threshold: of the next pass. excess: what was sent beyond k a step so far, in units of k.
    cut: all above it was taken out in the last step. aim: how many are expected above `threshold`;
    spread: the mean of |log(found / expected)|. k: of the plan that this is for.
    """

    threshold: float = math.inf
    excess: float = 0.0
    cut: float = math.inf
    aim: float = 0.0
    spread: float = 0.0
    k: float = 0.0

    def bounds(self, plan: SparsityPlan) -> tuple[int, int, int]:
        """Return the fewest and the most entries that may be sent as they are found, and between
        them to how many more are reduced: (fewest, reduced, most).

        Within the plan's bounds, and such that the excess stays within MOST_EXCESS.
        """
        k, due = plan.k, plan.k * (1 - self.excess)
        fewest = max(plan.k_bounds[0], math.ceil(due - MOST_EXCESS * k))
        most = max(fewest, min(plan.k_bounds[1], math.floor(due + MOST_EXCESS * k)))
        return fewest, min(max(round(due), fewest), most), most

    def after(
        self, plan: SparsityPlan, tail: Tail, num_met: int, cut: float, count: int
    ) -> Steering:
        """Return what to go on with after a step in which `num_met` entries reached the threshold
        and `count`, all above `cut`, were taken out."""
        excess = self.excess + count / plan.k - 1
        excess = max(-MOST_EXCESS, min(MOST_EXCESS, excess))
        spread = self.spread
        if self.aim > 0:
            off = abs(math.log((num_met + 1) / (self.aim + 1)))
            spread += _SPREAD_GAIN * (min(off, _MOST_SPREAD) - spread)
        fewest = max(plan.k_bounds[0], plan.k * (1 - excess - MOST_EXCESS))
        safe = min(fewest * math.exp(_SPREADS * spread), _MOST_AIM * plan.k)
        aim = max(plan.k * (1 - _MADE_UP * excess), safe)
        arriving = count if self.cut == math.inf else tail.count(self.cut, cut, count)
        return Steering(tail.threshold(aim, cut, arriving), excess, cut, aim, spread, plan.k)

    def for_plan(self, plan: SparsityPlan) -> Steering:
        """Return what to start from with a plan: the threshold alone if its k is another."""
        return self if plan.k == self.k else Steering(threshold=self.threshold, k=plan.k)

    @staticmethod
    def merged(workers: Iterable[Steering], scale: float) -> Steering:
        """Return what to start from with what several workers had, times scale: the mean of their
        thresholds; nothing is known of the rest."""
        known = [w.threshold for w in workers if math.isfinite(w.threshold)]
        return Steering(scale * sum(known) / len(known)) if known else Steering()

    def to_tensor(self) -> Tensor:
        """Return (6,) float64, what `from_tensor` takes."""
        return torch.tensor(astuple(self), dtype=torch.float64, device="cpu")

    @staticmethod
    def from_tensor(state: Tensor) -> Steering:
        return Steering(*state.tolist())
