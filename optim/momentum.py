"""SGD with momentum, kept in full or in a sketch."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.options import given


class Momentum(MomentOptimizer):
    """torch.optim.SGD with momentum, neither dampened nor Nesterov's: m <- momentum m + g.

    State: momentum_buffer, as it is kept. Options: see MomentOptimizer.
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
        return {"first_beta": group["momentum"], "first_decay": 1 - group["momentum"]}


class SketchMomentum(Momentum):
    """Momentum in a count-sketch.

    Source: Spring et al. 2019 (PMLR 97), algorithm 2. Differs: the update does not take the median
        after the insertion, but the momentum that follows from the mean of the estimates before
        it, as far as they agree, and for the rest g / (1 - momentum). Where all rows arrive, the
        sketch is that of the momentum.
    Stable: on a quadratic, for lr x its largest curvature up to

            min(2 (1 - momentum), (1 - momentum) / momentum * r / (1 + 2 sqrt(r)))

        with r = size_ratio (depth width / rows) and depth 2 or more: 0.012 by default, where
        Momentum has 2 (1 + momentum) = 3.8. The first is gradient descent's with the rate
        lr / (1 - momentum), where nothing is known; of row-sparse gradients no other was met. The
        second: where all rows arrive, those that share buckets feed each other. The mean of the
        estimates is P m, and along an eigenvector of P with eigenvalue L the recurrences
        x' = x - lr (c x + momentum L m), m' = momentum m + c x decay for lr c below
        (1 - momentum) / (momentum (L - 1)). The largest L of random tables is (1 + 1 / sqrt(r))^2,
        of a single one the rows in its fullest bucket. That estimates count less where they
        disagree makes up to 4 times the rate stable. If a run diverges, lower the rate, or make
        the sketch larger or the momentum smaller.
    """

    structures = {"first_moment": "sketch"}  # noqa: RUF012
