"""Adagrad, with its sum of squares kept in a structure of one's choice."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.moments import factored_bound
from optim.options import given


class Adagrad(MomentOptimizer):
    """torch.optim.Adagrad, without lr_decay (use a scheduler) and initial_accumulator_value.

    Source: Duchi et al. 2011. A cover here is SM3 with Adagrad's eps.
    State: sum, as it is kept: see MomentOptimizer, also for the other options.
    """

    older_names = {"square_sum": "sum"}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
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
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

    def _second(self, group: Group) -> tuple[str, str]:
        return "sum", group["second_moment"]

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        bound = factored_bound(1.0) if group["second_moment"] == "factored" else {}
        return {"eps_outside": group["eps"], **bound}


class SketchAdagrad(Adagrad):
    """Adagrad in a count-min sketch: the sum never falls, unless it is cleaned.

    Source: Spring et al. 2019 (PMLR 97), algorithm 3. Differs: cleaning is off by default, so that
        a sketch without collisions is Adagrad; the paper's is clean_factor 0.2, clean_interval 125.
    """

    structures = {"second_moment": "sketch"}  # noqa: RUF012
