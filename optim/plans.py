"""Steps that are prepared once and kept: an optimizer's step is then one call for all of them.

What a parameter's step needs (moments, views, checks, the kernel's arguments) follows from tensors
and options that seldom change. A plan keeps it, and tells before each step whether it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim import options
from optim.moments import SEEDS, Moment
from optim.update import matrices
from parsimony_kernels.runtime.checks import are_trusted, check_elements, check_parameter
from parsimony_kernels.step import ops

Group = Mapping[str, Any]  # a parameter group's options
_NO_RULE = ops.Rule(lr=0.0)


class Plan:
    """One parameter's step of a dense gradient, of rows of it, or of elements.

    Args: group: its options. options: what of them decides on structures, as `holds` is given it.
        state: of the parameter. moments: (first, second), over that state.
    """

    __slots__ = (
        *("args", "group", "matrix", "p", "second"),
        *("_data", "_device", "_dtype", "_kept", "_options", "_seeds", "_shape", "_state"),
    )

    def __init__(
        self,
        p: Tensor,
        group: Group,
        options: Any,
        state: Mapping[str, Tensor],
        moments: tuple[Moment | None, Moment | None],
        matrix: Tensor,
        args: ops.PlannedStep,
    ) -> None:
        self.p, self.group, self.matrix, self.args = p, group, matrix, args
        self.second = moments[1]
        self._options, self._state = options, state
        self._data, self._shape, self._dtype = p.data_ptr(), p.shape, p.dtype
        self._device = p.device
        self._kept = [(name, tensor, tensor.data_ptr()) for name, tensor in state.items()]
        # The kernel's arguments hold the values of these; a broadcast changes them in place.
        self._seeds = [(t, t.tolist()) for name, t in state.items() if name.endswith(SEEDS)]

    def arrived(self, grad: Tensor | None, pair: tuple[Tensor, Tensor] | None) -> Arrived | None:
        """Return a gradient, or indices and values of elements, as a kernel can read them.

        Returns: None if it cannot, or if the mistakes in them must be told.
        """
        if pair is not None:
            return self._elements(*pair)
        return self._rows(grad) if grad.is_sparse else self._dense(grad)

    def _dense(self, grad: Tensor) -> Arrived | None:
        if (
            type(grad) is Tensor
            and grad.dtype is self._dtype
            and grad.shape == self._shape
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and grad.device == self._device
        ):
            return Arrived(self, grad)
        return None

    def _rows(self, grad: Tensor) -> Arrived | None:
        if (
            type(grad) is Tensor
            and grad.layout is torch.sparse_coo
            and grad.dtype is self._dtype
            and grad.shape == self._shape
            and grad.device == self._device
            and grad.sparse_dim() == 1
            and len(self._shape) > 1
            and self.matrix.shape[0] == self._shape[0]
        ):
            grad = grad.detach().coalesce()
            return Arrived(self, grad.values().contiguous(), rows=grad.indices()[0])
        return None

    def _elements(self, indices: Tensor, values: Tensor) -> Arrived | None:
        if (
            type(values) is Tensor
            and type(indices) is Tensor
            and values.dtype is torch.float32
            and indices.dtype is torch.int64
            and values.dim() == 1
            and indices.shape == values.shape
            and values.is_contiguous()
            and indices.is_contiguous()
            and values.device == self._device
            and indices.device == self._device
        ):
            return Arrived(self, values, indices=indices)
        return None

    def holds(self, group: Group, options: Any, state: Mapping[str, Tensor]) -> bool:
        """Tell whether this is still how the parameter is stepped."""
        p = self.p
        if not (
            p.data_ptr() == self._data
            and p.dtype is self._dtype
            and p.shape == self._shape
            and p.device == self._device
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
    return None if args is None else Plan(p, group, options, state, moments, matrix, args)


class Arrived(NamedTuple):
    """What has arrived for a plan: a dense gradient, rows of it, or values of elements."""

    plan: Plan
    values: Tensor
    rows: Tensor | None = None
    indices: Tensor | None = None


def run(arrived: Sequence[Arrived], rule_of: Callable[[Group, int], ops.Rule]) -> None:
    """Make these steps.

    Args:   rule_of: group, number of the step -> its rule.
    Raises: ValueError if rows or indices are not ascending, unique and in range; no step has been
            made. Unless they are trusted, a GPU is waited for to find that out.
    """
    by_device: dict[torch.device, list[Arrived]] = {}
    for one in arrived:
        by_device.setdefault(one.plan.p.device, []).append(one)
    if not are_trusted():
        for on_device in by_device.values():
            _check([one for one in on_device if one.rows is not None or one.indices is not None])
    ending = _set(arrived, rule_of)
    for on_device in by_device.values():
        ops.step_planned([one.plan.args for one in on_device])
    if arrived:
        torch.autograd.graph.increment_version([one.plan.p for one in arrived])
    _clean([plan for plan, number in ending if plan.second.is_to_clean(number, plan.group)])


def _clean(due: Sequence[Plan]) -> None:
    """Do what Sketch.end_step does, for many sketches in one call."""
    by_factor: dict[float, list[Tensor]] = {}
    for one in due:
        factor = one.group["clean_factor"]
        by_factor.setdefault(factor, []).append(one.second.sketch.values)
    for factor, tables in by_factor.items():
        options.check({"clean_factor": factor})
        torch._foreach_mul_(tables, factor)


def _check(sparse: Sequence[Arrived]) -> None:
    for one in sparse:
        one.plan.args.set(_NO_RULE, *one[1:])
    wrong = ops.find_wrong_positions([one.plan.args for one in sparse])
    if wrong is None:
        return
    plan, values, rows, indices = sparse[wrong]
    if indices is not None:
        check_elements(values, indices, plan.p)
    else:
        check_parameter(plan.matrix, values.view(-1, plan.matrix.shape[1]), rows)


def _set(
    arrived: Sequence[Arrived], rule_of: Callable[[Group, int], ops.Rule]
) -> list[tuple[Plan, int]]:
    """Set what each step is run with.

    Returns: the plans whose moment has something to do after the step, and the step's number.
    """
    rules: dict[tuple[int, int], tuple[ops.Rule, ops.Rule]] = {}
    ending, pulled = [], {}
    for plan, values, rows, indices in arrived:
        number = plan.args.num_steps + 1
        key = id(plan.group), number
        both = rules.get(key)
        if both is None:
            rule = rule_of(plan.group, number)
            both = rules[key] = rule, rule.replace(param_scale=1.0)
        if indices is not None and both[0].param_scale != 1:
            pulled.setdefault(both[0].param_scale, []).append(plan.p)
        plan.args.set(both[indices is not None], values, rows, indices)
        if plan.second is not None and plan.second.has_ends:
            ending.append((plan, number))
    for scale, parameters in pulled.items():  # weight decay acts on all elements
        _scale(parameters, scale)
    return ending


def _scale(parameters: Sequence[Tensor], factor: float) -> None:
    """Multiply each, as `mul_` does."""
    # For 16-bit tensors on a CPU torch's foreach rounds the factor itself to 16 bits.
    on_cpu = [p for p in parameters if p.device.type == "cpu" and p.dtype.itemsize < 4]
    for p in on_cpu:
        p.mul_(factor)
    others = [p for p in parameters if p.device.type != "cpu" or p.dtype.itemsize >= 4]
    if others:
        torch._foreach_mul_(others, factor)
