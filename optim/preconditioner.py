"""Preconditioner: the second moment of one parameter, fed apart from the parameter's steps.

For a worker that sees every dense gradient while the optimizer sees only the few entries that the
workers agreed on (see MomentOptimizer.delegate_second_moment).
Shapes: N elements of the flattened parameter, K of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from optim.moments import SEEDS, Moment, balanced_split, matrix_shape
from parsimony_kernels.step import ops

Scalars = dict[str, float]


class Preconditioner:
    """A second moment and the number of steps that it has seen, at first `num_steps`.

    tensors: name -> tensor: all its state, changed in place. shared_names: of those that may be
    averaged over workers.
    """

    def __init__(
        self,
        moment: Moment,
        scalars_of: Callable[[int], Scalars],
        options: Callable[[], Mapping[str, Any]],
        num_steps: Tensor,
    ) -> None:
        self._moment, self._scalars_of, self._options = moment, scalars_of, options
        self.tensors = {**moment.tensors, "step": num_steps}
        self._last_ended = int(num_steps)  # the optimizer has ended the steps that it did itself
        self.shared_names = [name for name in moment.tensors if not name.endswith(SEEDS)]

    def observe(
        self, grad_N: Tensor, *, scale: Tensor | None, num_parts: int, is_first: bool
    ) -> None:
        """Take in one of the `num_parts` gradients that sum to a step's.

        The moment is of num_parts * grad, the gradient of a part by itself, averaged over parts.
        Args: scale: (1,) that multiplies the gradient, or None: see ops.observe. is_first:
            of the step.
        """
        if is_first:
            if self.is_fed:
                self._moment.end_step(int(self.tensors["step"]), self._options())
            self.tensors["step"] += 1
        scalars = self._scalars()
        rule = ops.Rule(
            lr=0.0,
            second_beta=scalars.get("second_beta", 1.0) if is_first else 1.0,
            second_gain=scalars.get("second_gain", 1.0) * num_parts,
            second_decay=scalars.get("second_decay", 0.0) if is_first else 0.0,
        )
        shape = self._moment.spec.shape
        split = balanced_split(shape) if self._moment.any_split else 1
        operand = self._moment.operand(split)
        ops.observe(grad_N.view(matrix_shape(shape, split)), rule, operand, scale=scale)
        self._moment.write_back(operand, split, is_dense=True)

    @property
    def is_fed(self) -> bool:
        """Whether it is another moment than the optimizer gave."""
        return int(self.tensors["step"]) != self._last_ended

    def take_out_of(self, state: dict[str, Tensor]) -> None:
        """Take over the moment that a parameter's loaded state holds, if it holds one."""
        if state.keys() >= self.tensors.keys() > {"step"}:
            for name, tensor in self.tensors.items():
                tensor.copy_(state["step"] if name == "step" else state.pop(name))
            self._last_ended = int(state["step"])

    def root(self, indices_K: Tensor | None = None) -> Tensor:
        """Return what to divide by, at indices (K,) int64 or everywhere (N,): 0 or more.

        In the state's dtype: float64 for a float64 parameter, else float32.
        sqrt(moment, with its bias corrected) + eps, as the optimizer's rule has it.
        """
        nu = self._moment.estimate().view(-1) if indices_K is None else self._moment.at(indices_K)
        scalars = self._scalars()
        scale = scalars.get("second_scale", 1.0)  # the scaled moment could overflow
        nu.add_(scalars.get("eps_inside", 0.0) / scale).sqrt_().mul_(math.sqrt(scale))
        return nu.add_(scalars.get("eps_outside", 0.0))

    def _scalars(self) -> Scalars:
        return self._scalars_of(int(self.tensors["step"]))
