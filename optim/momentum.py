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
    """

    structures = {"first_moment": "sketch"}  # noqa: RUF012
