"""Adagrad, whose sum of squares can be kept in full, as a cover, factored or in a sketch."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.moments import factored_bound
from optim.options import given


class Adagrad(MomentOptimizer):
    """torch.optim.Adagrad, without lr_decay (use a scheduler) and initial_accumulator_value.

    Source: Duchi et al. 2011. With second_moment="cover" it is SM3 with Adagrad's eps.
    State: sum, in the chosen structure. MomentOptimizer explains structures and other options.
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
    """Adagrad with its sum in a count-min sketch; the sum only falls when the sketch is cleaned.

    Source: Spring et al. 2019 (PMLR 97), algorithm 3. Differs: cleaning is off by default, so that
        without collisions it equals Adagrad. The paper has clean_factor 0.2, clean_interval 125.
    """

    structures = {"second_moment": "sketch"}  # noqa: RUF012
