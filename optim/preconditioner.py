"""Preconditioner: the second moment of one parameter, which somebody else than the optimizer feeds.

Made by MomentOptimizer.delegate_second_moment, for a worker that sees every dense gradient while
its optimizer sees only the few entries that the workers exchange.
Shapes: N elements of the flattened parameter, K of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.matrix import balanced_split, matrix_shape
from optim.moments import SEEDS, Moment
from parsimony_kernels.runtime.operands import Table, state_dtype
from parsimony_kernels.step import ops

Scalars = dict[str, float]
_LEAST_EPS = 1e-37  # no denormal number


class Preconditioner:
    """A second moment, and the number of steps in which it was fed.

    Args: scalars_of: step -> the optimizer's fields of ops.Rule in that step. options: returns the
        parameter's group. num_steps: the steps that the optimizer has made of the parameter.
    Attributes: tensors: name -> tensor, all its state, which is changed in place. shared_names: the
        tensors that workers may average.
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
        shape = moment.spec.shape
        self._split = balanced_split(shape) if moment.any_split else 1
        self._matrix_shape = matrix_shape(shape, self._split)
        self._kept_at: list[int] = []
        self._last_ended = int(num_steps)  # for these steps the optimizer has called end_step
        self.shared_names = [name for name in moment.tensors if not name.endswith(SEEDS)]

    def observe(
        self, grad_N: Tensor, *, scale: Tensor | None, num_parts: int, is_first: bool
    ) -> None:
        """Feed one of the `num_parts` gradients (of micro-batches) whose sum is a step's gradient.

        The moment takes the mean over parts of the squares of num_parts * grad_N, the gradient of
        that micro-batch by itself.
        Args: scale: (1,), a factor of the gradient, or None: see ops.observe. is_first: whether
            this is the first part of the step.
        """
        self.observe_together([(self, grad_N, scale, num_parts, is_first)])

    @staticmethod
    def observe_together(
        given: Sequence[tuple[Preconditioner, Tensor, Tensor | None, int, bool]],
    ) -> None:
        """Do as `observe` with several, on one device and of one dtype of state.

        given: (who is fed, grad_N, scale, num_parts, is_first).
        """
        together, rules = [], {}
        for mine, grad_N, scale, num_parts, is_first in given:
            mine._begin(is_first)
            key = id(mine._options()), int(mine.tensors["step"]), num_parts, is_first
            rule = rules.get(key) or rules.setdefault(key, mine._rule(num_parts, is_first))
            grad = grad_N.view(mine._matrix_shape)
            if mine._moment.is_view(mine._split) and mine._is_usual(grad_N, scale):
                together.append(ops.Observation(mine._observed(), grad, rule, scale))
            else:
                operand = mine._moment.operand(mine._split)
                ops.observe(grad, rule, operand, scale=scale)
                mine._moment.write_back(operand, mine._split, is_dense=True)
        ops.observe_together(together)

    def _is_usual(self, grad_N: Tensor, scale: Tensor | None) -> bool:
        """Tell whether kernels can read a gradient, and its scale, as they are."""
        spec = self._moment.spec
        return (
            grad_N.device == spec.device
            and state_dtype(grad_N.dtype) == spec.dtype
            and grad_N.is_contiguous()
            and (grad_N.data_ptr() != 0 or not grad_N.numel())
            and (scale is None or (scale.dtype, scale.device) == (spec.dtype, spec.device))
        )

    def _begin(self, is_first: bool) -> None:
        if is_first:
            if self._moment.has_ends and self.is_fed:
                self._moment.end_step(int(self.tensors["step"]), self._options())
            self.tensors["step"] += 1

    def _rule(self, num_parts: int, is_first: bool) -> ops.Rule:
        scalars = self._scalars()
        return ops.Rule(
            lr=0.0,
            second_beta=scalars.get("second_beta", 1.0) if is_first else 1.0,
            second_gain=scalars.get("second_gain", 1.0) * num_parts,
            second_forgetting=scalars.get("second_forgetting", 0.0) if is_first else 0.0,
        )

    def _observed(self) -> ops.Observed:
        """Return the moment as it is fed, which is kept as long as its memory stays."""
        at = [tensor.data_ptr() for tensor in self.tensors.values()]
        if at != self._kept_at:
            self._kept_at, self._kept = at, ops.Observed(self._moment.operand(self._split))
        return self._kept

    @property
    def is_fed(self) -> bool:
        """Whether it has been fed since the optimizer gave it away, or since it was loaded."""
        return int(self.tensors["step"]) != self._last_ended

    def take_out_of(self, state: dict[str, Tensor]) -> None:
        """Move the second moment of a parameter's loaded state, if it has one, into this one."""
        if state.keys() >= self.tensors.keys() > {"step"}:
            for name, tensor in self.tensors.items():
                tensor.copy_(state["step"] if name == "step" else state.pop(name))
            self._last_ended = int(state["step"])

    def root(self, indices_K: Tensor | None = None) -> Tensor:
        """Return what gradients are divided by: sqrt(bias-corrected moment) + eps, 0 or more.

        The moment is the one after the last `observe`. Of a sketch too it is the query, other than
        in an optimizer's step, which sets in the square of the gradient that it divides: what is
        divided here is what several steps have left, or other workers sent.
        Args:    indices_K: (K,) int64, of elements; None: all N elements.
        Returns: (K,) or (N,), in the dtype of the state.
        """
        nu = self._moment.estimate().view(-1) if indices_K is None else self._moment.at(indices_K)
        inside, scale, outside = self._of_root()
        return ops.sqrt_(nu.add_(inside)).mul_(scale).add_(outside)

    def _of_root(self) -> tuple[float, float, float]:
        """Return (inside, scale, outside): the root is sqrt(moment + inside) * scale + outside."""
        scalars = self._scalars()
        scale = scalars.get("second_scale", 1.0)  # applied after the root: nu * scale can overflow
        inside = scalars.get("eps_inside", 0.0) / scale
        return inside, math.sqrt(scale), scalars.get("eps_outside", 0.0)

    @staticmethod
    def roots_together(
        asked: Sequence[tuple[Preconditioner, int, int]], positions_K: Tensor
    ) -> Tensor:
        """Return what several tensors' elements are divided by, (K,), as `root` of each would.

        asked: (of whom, count, first): the next `count` of the positions (K,) int64 are of this
        tensor, whose elements are `first` less.
        """
        roots, scalars = [], {}
        for mine, count, first in asked:
            operand = mine._moment.operand(mine._split)
            if isinstance(operand, Table):  # each has a kernel of its own
                return _one_by_one(asked, positions_K)
            key = id(mine._options()), int(mine.tensors["step"])
            of_root = scalars.get(key) or scalars.setdefault(key, mine._of_root())
            roots.append(ops.Root(operand, count, first, *of_root))
        return ops.roots(roots, positions_K)

    @property
    def may_be_zero(self) -> bool:
        """Whether a root can be 0 anywhere: whether no eps is added that float32 can hold."""
        scalars = self._scalars()
        inside = scalars.get("eps_inside", 0.0) / scalars.get("second_scale", 1.0)
        return not max(inside, scalars.get("eps_outside", 0.0)) >= _LEAST_EPS

    def _scalars(self) -> Scalars:
        return self._scalars_of(int(self.tensors["step"]))


def _one_by_one(asked: Sequence[tuple[Preconditioner, int, int]], positions_K: Tensor) -> Tensor:
    parts = positions_K.split([count for _, count, _ in asked])
    pairs = zip(asked, parts, strict=True)
    return torch.cat([mine.root(part - first) for (mine, _, first), part in pairs])
