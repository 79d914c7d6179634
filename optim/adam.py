"""Adam, each of whose moments can be kept in full or in a smaller structure."""

from __future__ import annotations

import functools
import math
from typing import Any

from optim.base import Group, MomentOptimizer
from optim.moments import factored_bound
from optim.options import given

_DOUBT = 9.0  # weight of a sketch's uncertainty about m; a rare row's m is divided by a small root
_ROUNDING_MARGIN = 1.001  # so that rounding does not make the bound act on exact moments
_LARGEST_EXPONENT = 170.0  # sqrt(exp(170)) = 8e36: no quotient reaches a bound beyond that


class Adam(MomentOptimizer):
    """torch.optim.Adam, or AdamW if decoupled_weight_decay; betas[0] = 0 keeps no first moment.

    Source: Kingma and Ba 2015 (arXiv:1412.6980), algorithm 1.
    State: exp_avg and exp_avg_sq, each in its chosen structure. MomentOptimizer explains
        structures and other options.
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
            "first_forgetting": 1 - beta1,
            "first_scale": 1 / (1 - beta1**step),
            "first_doubt": _DOUBT,
            "second_beta": beta2,
            "second_gain": 1 - beta2,
            "second_forgetting": 1 - beta2,
            "second_scale": 1 / (1 - beta2**step),
            "eps_outside": group["eps"],
            **self._bound(group, step, beta1, beta2),
        }

    def _bound(self, group: Group, step: float, beta1: float, beta2: float) -> dict[str, float]:
        """Return the bound of |m| / sqrt(v) that the step needs, {} if it needs none.

        Sketches and factored means estimate m and v separately, so that the quotient can be far too
        large: for instance that of a rare row which shares buckets with a frequent one. It is
        bounded by the largest quotient that exact moments can have after `step` gradients. A
        factored v has a wider bound, the same in all steps: see moments.factored_bound. A cover
        needs none: its v is never less than the element's exact v.
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
    """Return betas as numbers; like torch's, they may be tensors."""
    beta1, beta2 = betas
    return (beta1, beta2) if type(beta1) is float else (float(beta1), float(beta2))


@functools.lru_cache(maxsize=256)
def _largest_exact(beta1: float, beta2: float, step: float) -> float:
    """Return the largest |m| / sqrt(v) of exact moments after so many steps.

    By the inequality of Cauchy and Schwarz, over the gradients of all steps; inf if there is none.
    """
    ratio = beta1**2 / beta2 if beta1 else 0.0
    growth = step * math.log(ratio) if ratio else -math.inf
    if growth > _LARGEST_EXPONENT:
        return math.inf
    terms = step if ratio == 1 else math.expm1(growth) / (ratio - 1)
    exact = (1 - beta1) * math.sqrt(terms / (1 - beta2))
    return _ROUNDING_MARGIN * exact * math.sqrt(1 - beta2**step) / (1 - beta1**step)


class SketchAdam(Adam):
    """Adam with both moments in sketches, which the paper calls CS-MV.

    With first_moment="full" it is the paper's CS-V, with betas[0] = 0 its CMS.
    Source: Spring et al. 2019 (PMLR 97), algorithm 4, which names M in the queries of the second
        moment where it means V.
    Differs: all rows of a step are queried before any is inserted. The paper updates by the
        estimates after the insertion, which are mostly of other rows where rows collide. Here the
        second moment is the average that follows from the estimate before the insertion and the
        entry's own square. Of the first moment the estimates before the insertion count as far as
        they agree with each other: to that extent the update takes the average that follows from
        their mean, and for the rest the entry's own gradient, without bias correction. When all
        rows arrive in a step, the sketch is exactly the sketch of the averages.
    """

    structures = {"first_moment": "sketch", "second_moment": "sketch"}  # noqa: RUF012


class SM3Adam(Adam):
    """Adam whose second moment is kept in the accumulators of SM3 (accumulator_0, ...), which here
    forget with betas[1]."""

    structures = {"first_moment": "full", "second_moment": "cover"}  # noqa: RUF012


class FactoredAdam(Adam):
    """Adam whose second moment is kept as its row and column means: exp_avg_sq_row, exp_avg_sq_col.

    Source: Shazeer and Stern 2018 (arXiv:1804.04235), section 3. Differs: bias correction, eps and
        rate are Adam's, so the rate is not relative to the parameter; the update is not clipped by
        its mean square, but each of its entries is bounded (moments.factored_bound).
    """

    structures = {"first_moment": "full", "second_moment": "factored"}  # noqa: RUF012
