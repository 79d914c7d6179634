"""Steps of CPU tensors that are made once and kept: a step is then one call for all of them.

What a parameter's step needs (moments, views, checks, the kernel's arguments) follows from tensors
and options that seldom change. A plan keeps it, and tells before each step whether it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.moments import SEEDS, Moment
from optim.update import matrices
from parsimony_kernels.runtime.checks import check_elements
from parsimony_kernels.step import ops

Group = Mapping[str, Any]  # a parameter group's options


class Plan:
    """One parameter's step of a dense gradient, or of its elements.

    Args: group: its options. options: what of them decides on structures, as `holds` is given it.
        state: of the parameter. moments: (first, second), over that state.
    """

    __slots__ = (
        *("args", "group", "p", "second", "step"),
        *("_data", "_dtype", "_kept", "_options", "_seeds", "_shape", "_state"),
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
        # The kernel's arguments hold the values of these; a broadcast changes them in place.
        self._seeds = [(t, t.tolist()) for name, t in state.items() if name.endswith(SEEDS)]

    def takes(self, grad: Tensor) -> bool:
        """Tell whether this is a dense gradient, as the kernel reads one."""
        return (
            type(grad) is Tensor
            and grad.dtype is self._dtype
            and grad.shape == self._shape
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and grad.is_cpu
        )

    def takes_elements(self, indices: Tensor, values: Tensor) -> bool:
        """Tell whether these are values of elements (k,), and their indices (k,), in any order."""
        return (
            type(values) is Tensor
            and type(indices) is Tensor
            and values.dtype is torch.float32
            and indices.dtype is torch.int64
            and values.dim() == 1
            and indices.shape == values.shape
            and values.is_contiguous()
            and indices.is_contiguous()
            and values.is_cpu
            and indices.is_cpu
        )

    def holds(self, group: Group, options: Any, state: Mapping[str, Tensor]) -> bool:
        """Tell whether this is still how the parameter is stepped."""
        p = self.p
        if not (
            p.data_ptr() == self._data
            and p.is_contiguous()
            and state is self._state
            and len(state) == len(self._kept)
            and group is self.group
            and options == self._options
        ):
            return False
        for name, tensor, at in self._kept:
            if state.get(name) is not tensor or tensor.data_ptr() != at:
                return False
        for tensor, seeds in self._seeds:
            if tensor.tolist() != seeds:
                return False
        return True


def plan(
    p: Tensor,
    group: Group,
    options: Any,
    state: Mapping[str, Tensor],
    moments: tuple[Moment | None, Moment | None],
) -> Plan | None:
    """Return a plan for a parameter that has just made a step; None if it cannot have one."""
    if not p.is_contiguous():
        return None
    matrix, split = matrices(p, moments)
    if not all(moment.is_view(split) for moment in moments if moment):
        return None
    first, second = (moment and moment.operand(split) for moment in moments)
    args = ops.planned(matrix, first, second, state["step"])
    return None if args is None else Plan(p, group, options, state, moments, args)


Arrived = tuple[Plan, Tensor, Tensor | None]  # gradient, or values of elements and their indices


def run(arrived: Sequence[Arrived], rule_of: Callable[[Group, int], ops.Rule]) -> None:
    """Make these steps. rule_of: group, number of the step -> its rule.

    Raises: ValueError if indices are not ascending, unique and in range; no step has been made.
    """
    if not arrived:
        return
    rules: dict[tuple[int, int], tuple[ops.Rule, ops.Rule]] = {}
    ending, pulled = [], []
    for one, grad, indices in arrived:
        number = int(one.step) + 1
        key = id(one.group), number
        both = rules.get(key)
        if both is None:
            rule = rule_of(one.group, number)
            both = rules[key] = rule, rule.replace(param_scale=1.0)
        if indices is None:
            one.args.set(grad, both[0])
        else:
            one.args.set(grad, both[1], indices)
            if both[0].param_scale != 1:  # it acts on the elements that did not arrive, too
                pulled.append((one.p, both[0].param_scale))
        if one.second is not None and one.second.has_ends:
            ending.append((one, number))
    of_elements = [each for each in arrived if each[2] is not None]
    wrong = ops.find_wrong_indices([one.args for one, *_ in of_elements])
    if wrong is not None:
        one, values, indices = of_elements[wrong]
        check_elements(values, indices, one.p)
    for p, scale in pulled:
        p.mul_(scale)
    ops.step_planned([one.args for one, *_ in arrived])
    torch.autograd.graph.increment_version([one.p for one, *_ in arrived])
    for one, number in ending:
        one.second.end_step(number, one.group)
