"""SM3: one running maximum for each index of each axis, instead of one number for each element."""

from __future__ import annotations

from typing import Any

from optim.base import Group, MomentOptimizer
from optim.options import given


class SM3(MomentOptimizer):
    """Adagrad in the memory of its axes; a drop-in for the package torch-SM3, checkpoints included.

        nu <- min over axes of the accumulators + g^2         beta > 0: beta min + (1 - beta) g^2
        accumulators <- maximum of nu over their slices       variant II; I adds the maximum of g^2
        p <- p - lr EMA of g / sqrt(nu + eps)                 the EMA only if momentum > 0

    Source: Anil et al. 2019 (arXiv:1901.11150), algorithms SM3-II and SM3-I. Advice there:
        quadratic warm-up of the rate, constant, linear fall (QuadraticWarmupLinearCooldown), and
        Polyak averaging (torch.optim.swa_utils.AveragedModel).
    Differs: from torch-SM3, whose own tests it passes: with beta > 0 accumulators can fall. Sparse
        gradients may be of rows, and of tensors of any rank; they leave what is absent alone, are
        summed where indices repeat, and have momentum, of what arrived. 16-bit parameters have
        float32 state. A parameter without a gradient is passed over. State is made at once, so
        that it always has an accumulator for each axis, as dense gradients need. From the paper:
        eps; vectors keep one accumulator an element, which is Adagrad; sparse gradients read that
        of the first axis alone, as in the paper's code: the others, which any row raises, would
        not bound better. (What comes as `elements` of a step reads all: the rest of such a
        gradient is 0, so that they do.)
    State: accumulator_0, ..., one for each axis, shaped (1, .., n_k, .., 1); momentum_buffer.
        torch-SM3's is taken over, of sparse gradients too, and goes on in torch-SM3 if dense.
    Options: see MomentOptimizer. No tensor is too small for a cover unless min_compressed_numel
        says so.
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
