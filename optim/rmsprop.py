"""RMSprop, whose average of squares can be kept in full, as a cover, factored or in a sketch."""

from __future__ import annotations

import math
from typing import Any

from optim.base import Group, MomentOptimizer
from optim.moments import factored_bound
from optim.options import given


class RMSprop(MomentOptimizer):
    """torch.optim.RMSprop, not centered.

    Source: Tieleman and Hinton 2012.
    State: square_avg, in the chosen structure; momentum_buffer, always in full, which averages the
        gradients after they are divided. Options: see MomentOptimizer.
    """

    first_follows_update = True

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        second_moment: str | None = None,
        decoupled_weight_decay: bool = False,
        min_compressed_numel: int = 4096,
        depth: int = 3,
        size_ratio: float = 0.2,
        width: int | None = None,
        seed: int = 0,
        clean_factor: float = 0.2,
        clean_interval: int | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

    def _first(self, group: Group) -> tuple[str, str] | None:
        return ("momentum_buffer", "full") if group["momentum"] else None

    def _second(self, group: Group) -> tuple[str, str]:
        return "square_avg", group["second_moment"]

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        alpha, bound = group["alpha"], {}
        if group["second_moment"] == "factored":
            bound = factored_bound(1 / math.sqrt(1 - alpha), 1 / math.sqrt(1 - alpha**step))
        return {
            "first_beta": group["momentum"],
            "second_beta": alpha,
            "second_gain": 1 - alpha,
            "second_forgetting": 1 - alpha,
            "eps_outside": group["eps"],
            **bound,
        }


class SketchRMSprop(RMSprop):
    """RMSprop in a count-min sketch.

    Source: Spring et al. 2019 (PMLR 97), algorithm 4's second moment by itself (CMS-RMSprop).
    """

    structures = {"second_moment": "sketch"}  # noqa: RUF012
