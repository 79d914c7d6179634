"""SM3, which keeps one running maximum for each index of each axis, not a number an element."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.options import given


class SM3(MomentOptimizer):
    """Adagrad with one accumulator for each axis instead of full state; replaces torch-SM3.

    Arguments, results and checkpoints are those of the package torch-SM3, but for `Differs`.

        nu <- min over axes of the accumulators + g^2         beta > 0: beta min + (1 - beta) g^2
        accumulators <- maximum of nu over their slices       variant II; I adds the maximum of g^2
        p <- p - lr EMA of g / sqrt(nu + eps)                 the EMA only if momentum > 0

    Source: Anil et al. 2019 (arXiv:1901.11150), algorithms SM3-II and SM3-I. The authors advise a
        rate with quadratic warm-up and linear fall (QuadraticWarmupLinearCooldown) and Polyak
        averaging (torch.optim.swa_utils.AveragedModel).
    Differs from torch-SM3, whose own tests it passes: with beta > 0 accumulators can fall. Sparse
        gradients may be of rows, and of tensors with any number of axes; absent rows or elements
        are not changed, repeated indices are summed, and those that arrived have momentum. 16-bit
        parameters have float32 state. A parameter without a gradient is passed over. State is made
        when the optimizer is, with an accumulator for each axis, which dense gradients need.
    Differs from the paper: eps. A vector has one accumulator an element, which is Adagrad. A sparse
        gradient reads only the first axis' accumulator, as in the paper's code: any row raises the
        other ones, so they would not bound better. (`elements` of a step read all accumulators:
        the rest of such a gradient is known to be 0, so the others do bound better.)
    State: accumulator_0, ..., one for each axis, shaped (1, .., n_k, .., 1); momentum_buffer. It
        loads state of torch-SM3, also of sparse gradients; torch-SM3 loads ours of dense ones.
    Options: see MomentOptimizer; min_compressed_numel is 0 by default, so that small tensors are
        covered too.
    """

    first_follows_update = True

    def __init__(
        self,
        params: Any,
        lr: Any = 0.1,
        momentum: float = 0.0,
        beta: float = 0.0,
        eps: float = 1e-30,
        *,
        variant: str = "II",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        min_compressed_numel: int = 0,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, given(locals()))

    def _first(self, group: Group) -> tuple[str, str] | None:
        return ("momentum_buffer", "full") if group["momentum"] else None

    def _second(self, group: Group) -> tuple[str, str]:
        return "accumulator_0", "cover"

    def _scalars(self, group: Group, step: int) -> dict[str, float]:
        momentum, beta = group["momentum"], group["beta"]
        return {
            "first_beta": momentum,
            "first_gain": 1 - momentum,
            "second_beta": beta or 1.0,
            "second_gain": 1 - beta,
            "eps_inside": group["eps"],
        }
