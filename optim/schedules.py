"""The learning-rate schedule that the authors of SM3 advise, as a scheduler of torch.

They also advise Polyak averaging, for which there is torch.optim.swa_utils.AveragedModel.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class QuadraticWarmupLinearCooldown(LambdaLR):
    """The rate rises with the square of the step, stays, then falls linearly to 0.

    Source: Anil et al. 2019 (arXiv:1901.11150). Differs: the warm-up counts steps from 1, so that
        the rate of the first step is not 0.
    Args:
        total_steps: steps of the run; after them the rate is 0.
        warmup_steps: steps in which the rate rises; None: a twentieth of the run.
        cooldown_fraction: the part of the run, at its end, in which the rate falls.
    Example: total_steps=10, warmup_steps=2, cooldown_fraction=0.2 multiplies the rate by
        1/4, 1, 1, 1, 1, 1, 1, 1, 1, 1/2 in ten steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int | None = None,
        cooldown_fraction: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= cooldown_fraction <= 1:
            raise ValueError(f"cooldown_fraction is {cooldown_fraction}; allowed: 0 to 1")
        cooldown_steps = round(cooldown_fraction * total_steps)
        if warmup_steps is None:
            warmup_steps = total_steps // 20
        if not 0 <= warmup_steps <= total_steps - cooldown_steps:
            raise ValueError(
                f"warmup_steps is {warmup_steps}; allowed: 0 to {total_steps - cooldown_steps}, "
                f"which the cool-down leaves of {total_steps} steps"
            )
        shape = _Shape(warmup_steps, total_steps, cooldown_steps)
        super().__init__(optimizer, shape, last_epoch)


class _Shape:
    """Returns the factor of a step's rate. An object and not a function, because a LambdaLR saves
    the attributes of objects in its state."""

    def __init__(self, warmup_steps: int, total_steps: int, cooldown_steps: int) -> None:
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.cooldown_steps = cooldown_steps

    def __call__(self, step: int) -> float:
        steps_left = self.total_steps - step
        if steps_left <= 0:
            return 0.0
        if steps_left < self.cooldown_steps:
            return steps_left / self.cooldown_steps
        if step < self.warmup_steps:
            return ((step + 1) / self.warmup_steps) ** 2
        return 1.0
