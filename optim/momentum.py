"""SGD with momentum, kept in full or in a sketch."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.options import given


class Momentum(MomentOptimizer):
    """torch.optim.SGD with momentum, without dampening and Nesterov's form: m <- momentum m + g.

    State: momentum_buffer, in the chosen structure. Options: see MomentOptimizer.
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        first_moment: str | None = None,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        min_compressed_numel: int = 4096,
        depth: int = 3,
        size_ratio: float = 0.2,
        width: int | None = None,
        seed: int = 0,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

    def _first(self, group: Group) -> tuple[str, str] | None:
        return ("momentum_buffer", group["first_moment"]) if group["momentum"] else None

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        return {"first_beta": group["momentum"], "first_forgetting": 1 - group["momentum"]}


class SketchMomentum(Momentum):
    """Momentum in a count-sketch.

    Source: Spring et al. 2019 (PMLR 97), algorithm 2. Differs: the paper updates by the median of
        the estimates after the insertion. Here the estimates before the insertion count as far as
        they agree with each other: to that extent the update takes the momentum that follows from
        their mean, and for the rest g / (1 - momentum). When all rows arrive in a step, the sketch
        is exactly the sketch of the momentum.
    Stability: on a quadratic function it converges if lr x the largest curvature is at most

            min(2 (1 - momentum), (1 - momentum) / momentum * r / (1 + 2 sqrt(r)))

        where r = size_ratio (depth width / rows) and depth is 2 or more. By default that is 0.012;
        Momentum allows 2 (1 + momentum) = 3.8. If a run diverges, lower the rate or the momentum,
        or make the sketch larger.
        The first bound is that of gradient descent with the rate lr / (1 - momentum), which this
        is where the estimates do not agree at all. With row-sparse gradients we have met no other.
        The second is for steps in which all rows arrive: rows that share buckets feed each other.
        The mean of the estimates is P m for some matrix P. Along an eigenvector of P with
        eigenvalue L, the recurrences x' = x - lr (c x + momentum L m), m' = momentum m + c x
        converge if lr c is below (1 - momentum) / (momentum (L - 1)). The largest L of random
        tables is (1 + 1 / sqrt(r))^2; that of a single table is the number of rows in its fullest
        bucket. Because estimates count less where they disagree, up to 4 times this rate is stable.
    """

    structures = {"first_moment": "sketch"}  # noqa: RUF012
