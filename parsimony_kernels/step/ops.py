"""The operations on tensors and their compressed state: what each takes, which is checked here.

reference.py specifies what each does, in plain torch; host.cpp and device.cu do the same.
runtime/choice.py says which of them runs.

All state of a parameter, and the arithmetic on it, has the "state's dtype": float64 for a float64
parameter, else float32 (operands.state_dtype).
Shapes: n rows of m columns make the parameter's 2-D view; k of its rows, or elements, arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from parsimony_kernels.runtime.checks import (
    check_elements,
    check_first,
    check_num_rows,
    check_parameter,
    check_rows,
    check_second,
    check_shape,
    check_table,
    check_tensor,
)
from parsimony_kernels.runtime.choice import IMPLEMENTATIONS as IMPLEMENTATIONS
from parsimony_kernels.runtime.choice import implementation as implementation
from parsimony_kernels.runtime.choice import implementing_module
from parsimony_kernels.runtime.choice import use as use
from parsimony_kernels.runtime.operands import (
    MAX_ROWS,
    STATE_DTYPES,
    STEP_DTYPES,
    First,
    Rule,
    Second,
    Table,
)
from parsimony_kernels.step.observing import Observation as Observation
from parsimony_kernels.step.observing import Observed as Observed
from parsimony_kernels.step.roots import Root as Root


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    """Add values (k, m), in the table's dtype, to the buckets of rows (k,) int64, in order.

    Rows may repeat. A bucket's values are summed in the order of `rows` before they are added to
    it, so that the result does not depend on threads or devices.
    """
    check_table(table, values.shape[-1], values.device)
    check_rows(rows, values, table.values.dtype)
    if values.numel() > 0:
        _run(table.values).sketch_insert(table, rows, values)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    """Return the estimates (k, m), in the table's dtype, for rows (k,) int64."""
    check_table(table, table.values.shape[-1], rows.device)
    check_rows(rows, None)
    return _run(table.values).sketch_query(table, rows)


def sketch_query_elements(table: Table, indices: Tensor) -> Tensor:
    """Return the estimates (k,) of elements (k,) int64 of the flattened (rows, m), in any order."""
    check_table(table, table.values.shape[-1], indices.device)
    check_rows(indices, None, bound=MAX_ROWS * table.values.shape[-1], name="indices")
    return _run(table.values).sketch_query_elements(table, indices)


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, *, gain: float = 1.0, forgetting: float = 0.0
) -> None:
    """Insert gain * values - forgetting * query(rows), every query being of the sketch as it was.

    Source: Spring et al. 2019, Algorithms 2-4. Differs: rows that arrive together are queried
    together; and where `count` of them share a bucket, it gives up at most estimate / count for
    each (2 estimate / count in a count-sketch) instead of forgetting * estimate. Without that, a
    count-min bucket could fall below 0, which would make the next step infinite, and a momentum of
    0.9 in a count-sketch of 5% of the size grows to infinity in a hundred steps.
    """
    check_table(table, values.shape[-1], values.device)
    check_rows(rows, values, table.values.dtype)
    if values.numel() > 0:
        _run(table.values).sketch_update(table, rows, values, gain, forgetting)


def step(
    param: Tensor,
    grad: Tensor,
    rule: Rule,
    *,
    first: First = None,
    second: Second = None,
    rows: Tensor | None = None,
) -> None:
    """Update state and parameter (n, m) in place from a gradient: dense (n, m), or rows (k, m).

    Of the parameter, only `rows` (k,) int64, ascending and unique, are read and written. `grad` has
    the parameter's dtype; state and arithmetic have the state's dtype.

    If only some rows arrive, state that rows share changes as follows. Cover: the estimate is the
    row's accumulator alone, and the columns' accumulators can only rise (as in SM3's own code).
    Factored: the columns change by what the arriving rows change, (1/n) sum (gain g^2 - forgetting
    nu). Sketches: all rows are queried, then inserted.

    The update does not query a sketch after the insertion: where rows collide, it would find mostly
    the other rows' gradients of this step. It takes the moment that follows from the estimate
    before the step and the entry's own gradient: second_beta query + second_gain g^2 for a second
    moment; for a first one Rule says what, as the median is not taken either. If all rows arrive,
    a first moment's sketch is scaled before they are inserted, and then is exactly the sketch of
    the moment. So parameter, gradient and sketch are read once, and together.
    """
    check_parameter(param, grad, rows)
    if grad.dtype != param.dtype:
        raise ValueError(f"grad is {grad.dtype}; allowed: the parameter's dtype, {param.dtype}")
    check_first(first, param)
    check_second(second, param)
    if grad.numel() > 0:
        _run(param).step(param, grad, rule.scalars(param.dtype), first, second, rows)


class PlannedStep(Protocol):
    """A step of one parameter whose arguments have been checked, and are kept."""

    @property
    def num_steps(self) -> int:
        """How many steps it has made: what the tensor num_steps holds."""

    def set(
        self,
        rule: Rule,
        values: Tensor,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """Set what it is run with next: a dense gradient, rows of it, or values of elements.

        They must be such as `step` and `step_elements` take.
        """


def planned(param: Tensor, first: First, second: Second, num_steps: Tensor) -> PlannedStep | None:
    """Return steps of a parameter (n, m), of any kind of gradient, as one to be kept.

    Whoever keeps it keeps the tensors, and makes another when the memory of one of them changes.
    Args:    num_steps: (), float32, on the CPU; each step adds 1.
    Returns: None where they cannot be kept: only native kernels can.
    """
    check_parameter(param, param, None)
    check_first(first, param)
    check_second(second, param)
    check_shape("num_steps", num_steps, (), torch.device("cpu"))
    module = _run(param)
    has_plans = hasattr(module, "PlannedStep") and param.numel() > 0
    return module.PlannedStep(param, first, second, num_steps) if has_plans else None


def find_wrong_positions(steps: Sequence[PlannedStep]) -> int | None:
    """Return the number of a step whose rows or indices are not ascending, unique and in range.

    The steps are on one device. A GPU is waited for, once for all of them.
    Returns: None if there is no such step.
    """
    return type(steps[0]).find_wrong_positions(steps) if steps else None


def step_planned(steps: Sequence[PlannedStep]) -> None:
    """Make these steps, as `step` and `step_elements` would one after another, on one device."""
    type(steps[0]).run(steps)


def step_elements(
    param: Tensor,
    values: Tensor,
    indices: Tensor,
    rule: Rule,
    *,
    first: First = None,
    second: Second = None,
) -> None:
    """Update state and parameter (n, m) in place where elements of the gradient arrive.

    `indices` (k,) int64 into the flattened parameter, ascending and unique; `values` (k,) in the
    state's dtype.
    A Cover's accumulators can only rise. Factored rows and columns change by what the arriving
    elements change. Of a sketch, only the elements' own columns are queried and inserted, and the
    update takes what follows from those queries, as in `step`.
    """
    check_tensor("param", param, param.device, STEP_DTYPES, 2)
    check_num_rows(param)
    check_elements(values, indices, param)
    check_first(first, param)
    check_second(second, param)
    if values.numel() > 0:
        _run(param).step_elements(param, values, indices, rule.scalars(param.dtype), first, second)


def observe(grad: Tensor, rule: Rule, second: Second, *, scale: Tensor | None = None) -> None:
    """Feed a second moment with a dense gradient (n, m), as a dense `step` would, but step nothing.

    Of the rule, only second_beta, second_gain and second_forgetting are used. `scale` (1,)
    multiplies the gradient, and the product is rounded to the state's dtype. It is float32; for a
    float64 gradient it may be float64.
    """
    check_tensor("grad", grad, grad.device, STEP_DTYPES, 2)
    check_num_rows(grad)
    if second is None:
        raise ValueError("second is None; allowed: a second moment to feed")
    check_second(second, grad)
    if scale is not None:
        is_double = grad.dtype == torch.float64
        check_shape("scale", scale, (1,), grad.device, STATE_DTYPES[: 1 + is_double])
    scalars = ("second_beta", "second_gain", "second_forgetting")
    given = rule.scalars(torch.float64)  # as they were given
    alone = Rule(lr=0.0, **{name: getattr(given, name) for name in scalars})
    observe_together([Observation(Observed(second), grad, alone, scale)])


def observe_together(given: Sequence[Observation]) -> None:
    """Feed several second moments, each with a dense gradient, as `observe` would.

    On one device, and of one dtype of state. Nothing is checked.
    """
    given = [one for one in given if one.grad.numel()]
    if given:
        grad = given[0].grad
        if grad.dtype == torch.float64:
            given = [one._replace(rule=one.rule.scalars(grad.dtype)) for one in given]
        _run(grad).observe(given)


def roots(asked: Sequence[Root], positions_K: Tensor) -> Tensor:
    """Return the roots of several tensors' second moments, (K,) in the dtype of the state.

    Args: asked: of the positions (K,) int64, one tensor's after the other's; on one device, in one
            dtype. They are not checked.
    """
    return _run(asked[0].tensor).roots(asked, positions_K.contiguous())


def sqrt_(x: Tensor) -> Tensor:
    """Replace numbers, of any shape, by their roots, rounded to the nearest; return them.

    On CPUs torch's own roots are MKL's, of which a fifth are off by one unit in the last place.
    """
    return _run(x).sqrt_(x)


def _run(tensor: Tensor) -> ModuleType:
    """Return the module that implements the operations on this tensor's device, in its dtype."""
    return implementing_module("step", tensor.device.type, tensor.dtype)
