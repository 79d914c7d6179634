"""Dense steps of CPU tensors that are made once and kept: a step is then one call for all of them.

What a parameter's step needs (moments, views, checks, the kernel's arguments) follows from tensors
and options that seldom change. A plan keeps it, and tells before each step whether it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.moments import Moment
from optim.update import matrices
from parsimony_kernels.step import ops

Group = dict[str, Any]


class Plan:
    """One parameter's dense step.

    Args: group: its options. options: what of them decides on structures, as `fits` will be given.
        state: of the parameter. moments: (first, second), over that state.
    """

    __slots__ = (
        *("args", "group", "p", "second", "step"),
        *("_data", "_dtype", "_kept", "_options", "_shape", "_state"),
    )

    def __init__(
        self,
        p: Tensor,
        group: Group,
        options: Any,
        state: Mapping[str, Tensor],
        moments: tuple[Moment | None, Moment | None],
        args: ops.PlannedStep,
    ) -> None:
        self.p, self.group, self.args = p, group, args
        self.second = moments[1]
        self.step = state["step"]
        self._options, self._state = options, state
        self._data, self._shape, self._dtype = p.data_ptr(), p.shape, p.dtype
        self._kept = [(name, tensor, tensor.data_ptr()) for name, tensor in state.items()]

    def fits(self, group: Group, options: Any, state: Mapping[str, Tensor], grad: Tensor) -> bool:
        """Tell whether this is still how the parameter is stepped by such a gradient."""
        p = self.p
        if not (
            p.data_ptr() == self._data
            and p.is_contiguous()
            and type(grad) is Tensor
            and grad.dtype is self._dtype
            and grad.shape == self._shape
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and grad.is_cpu
            and state is self._state
            and len(state) == len(self._kept)
            and group is self.group
            and options == self._options
        ):
            return False
        for name, tensor, at in self._kept:
            if state.get(name) is not tensor or tensor.data_ptr() != at:
                return False
        return True


def plan(
    p: Tensor,
    group: Group,
    options: Any,
    state: Mapping[str, Tensor],
    moments: tuple[Moment | None, Moment | None],
) -> Plan | None:
    """Return a plan for a parameter that has just made a dense step; None if it cannot have one."""
    if not p.is_contiguous():
        return None
    matrix, split = matrices(p, moments)
    if not all(moment.is_view(split) for moment in moments if moment):
        return None
    first, second = (moment and moment.operand(split) for moment in moments)
    args = ops.planned(matrix, first, second, state["step"])
    return None if args is None else Plan(p, group, options, state, moments, args)


def run(planned: Sequence[tuple[Plan, Tensor]], rule_of: Callable[[Group, int], ops.Rule]) -> None:
    """Make these steps, of these gradients. rule_of: group, number of the step -> its rule."""
    if not planned:
        return
    rules: dict[tuple[int, int], ops.Rule] = {}
    ending = []
    for one, grad in planned:
        number = int(one.step) + 1
        key = id(one.group), number
        rule = rules.get(key)
        if rule is None:
            rule = rules[key] = rule_of(one.group, number)
        one.args.set(grad, rule)
        if one.second is not None and one.second.has_ends:
            ending.append((one, number))
    ops.step_planned([one.args for one, _ in planned])
    torch.autograd.graph.increment_version([one.p for one, _ in planned])
    for one, number in ending:
        one.second.end_step(number, one.group)
