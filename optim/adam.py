"""Adam, with each of its moments kept in a structure of one's choice."""

from __future__ import annotations

import functools
import math
from typing import Any

from optim.base import Group, MomentOptimizer
from optim.moments import factored_bound
from optim.options import given

_DOUBT = 9.0  # divided by a rare row's small v, what collisions add to its m is not small
SLACK = 1.001  # for rounding, where the bound is reached
_BEYOND = 170.0  # the root of exp of it is beyond all float32


class Adam(MomentOptimizer):
    """torch.optim.Adam, or AdamW if decoupled_weight_decay; betas[0] = 0 keeps no first moment.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1.
    State: exp_avg, exp_avg_sq, as they are kept: see MomentOptimizer, also for the other options.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        first_moment: str | None = None,
        second_moment: str | None = None,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        min_compressed_numel: int = 4096,
        depth: int = 3,
        size_ratio: float = 0.2,
        width: int | None = None,
        seed: int = 0,
        clean_factor: float = 0.2,
        clean_interval: int | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

    def _first(self, group: Group) -> tuple[str, str] | None:
        return ("exp_avg", group["first_moment"]) if group["betas"][0] else None

    def _second(self, group: Group) -> tuple[str, str]:
        return "exp_avg_sq", group["second_moment"]

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        beta1, beta2 = _numbers(group["betas"])
        return {
            "first_beta": beta1,
            "first_gain": 1 - beta1,
            "first_decay": 1 - beta1,
            "first_scale": 1 / (1 - beta1**step),
            "first_doubt": _DOUBT,
            "second_beta": beta2,
            "second_gain": 1 - beta2,
            "second_decay": 1 - beta2,
            "second_scale": 1 / (1 - beta2**step),
            "eps_outside": group["eps"],
            **self._bound(group, step, beta1, beta2),
        }

    def _bound(self, group: Group, step: float, beta1: float, beta2: float) -> dict[str, float]:
        """Bound what sketches and factors make of m / sqrt(v) by the most that it can be in full.

        By Cauchy and Schwarz, over a history of at most `step` gradients. Where a rare row shares
        buckets with a frequent one, its estimate of m can be far beyond its own v. A factored v has
        a wider bound, for any number of steps: see moments.factored_bound. A cover's v is at least
        the element's own, so that it keeps within the bound by itself.
        """
        second = group["second_moment"]
        first = group["first_moment"] if beta1 else None
        is_exact = "sketch" not in (first, second) and second != "factored"
        if is_exact or second == "cover" or (beta1 and not beta2):
            return {}
        most = _largest_exact(beta1, beta2, math.inf if second == "factored" else step)
        if most == math.inf:
            return {}
        return factored_bound(most) if second == "factored" else {"largest_quotient": most}


def _numbers(betas: Any) -> tuple[float, float]:
    """Return betas, which may be tensors, as torch's may."""
    beta1, beta2 = betas
    return (beta1, beta2) if type(beta1) is float else (float(beta1), float(beta2))


@functools.lru_cache(maxsize=256)
def _largest_exact(beta1: float, beta2: float, step: float) -> float:
    """Return the most that m / sqrt(v), both in full, can be after so many steps."""
    ratio = beta1**2 / beta2 if beta1 else 0.0
    growth = step * math.log(ratio) if ratio else -math.inf
    if growth > _BEYOND:
        return math.inf
    terms = step if ratio == 1 else math.expm1(growth) / (ratio - 1)
    exact = (1 - beta1) * math.sqrt(terms / (1 - beta2))
    return SLACK * exact * math.sqrt(1 - beta2**step) / (1 - beta1**step)


class SketchAdam(Adam):
    """Adam in sketches: CS-MV of the paper; with first_moment="full", CS-V; betas[0] = 0, CMS.

    Source: Spring et al. 2019 (PMLR 97), algorithm 4. Differs: the listing names M in the
        second-moment queries where V is meant; rows that arrive together are queried together.
        The update does not take the median after the insertions for the first moment, which is
        mostly noise where rows collide: it takes the average that follows from the mean of the
        estimates before them, as far as they agree, and for the rest the entry's own gradient,
        without bias correction. Where all rows arrive, the sketch is that of the averages.
    """

    structures = {"first_moment": "sketch", "second_moment": "sketch"}  # noqa: RUF012


class SM3Adam(Adam):
    """Adam whose second moment is SM3's cover, an average that decays: accumulator_0, ..."""

    structures = {"first_moment": "full", "second_moment": "cover"}  # noqa: RUF012


class FactoredAdam(Adam):
    """Adam whose second moment is kept as its row and column means: exp_avg_sq_row, exp_avg_sq_col.

    Source: Shazeer and Stern 2018 (arXiv:1804.04235), section 3. Differs: Adam's bias correction,
        eps and rate, not one relative to the parameter; no clipping of the update by its mean
        square, but a bound for each entry (moments.factored_bound).
    """

    structures = {"first_moment": "full", "second_moment": "factored"}  # noqa: RUF012
