"""The operations for CPU tensors, by host.cpp. ops.py has checked the arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.runtime.build import host_library
from parsimony_kernels.runtime.operands import (
    Cover,
    Factored,
    First,
    FirstKind,
    Full,
    MomentOfUpdates,
    Rule,
    Second,
    SecondKind,
    Sketch,
    Storage,
    Table,
)
from parsimony_kernels.step.arguments import HostStep
from parsimony_kernels.step.observing import Observation
from parsimony_kernels.step.roots import Root, Rootings, rootings

_pointer, _i64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, gain: float, forgetting: float
) -> None:
    status = host_library().parsimony_sketch_update(
        ctypes.byref(Sketch.of(table)), _at(rows), _at(values), _i64(len(rows)),
        ctypes.c_float(gain), ctypes.c_float(forgetting), _int(torch.get_num_threads()),
    )  # fmt: skip
    _check(status)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    return _query(table, rows, (len(rows), table.values.shape[2]), is_elements=False)


def sketch_query_elements(table: Table, indices: Tensor) -> Tensor:
    return _query(table, indices, (len(indices),), is_elements=True)


def _query(table: Table, positions: Tensor, shape: tuple[int, ...], *, is_elements: bool) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    host_library().parsimony_sketch_query(
        ctypes.byref(Sketch.of(table)), _at(positions), _at(out), _i64(len(positions)),
        _int(is_elements), _int(torch.get_num_threads()),
    )  # fmt: skip
    return out


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    args = _host_step(param, grad, rows, rule, first, second)
    _check(host_library().parsimony_step(ctypes.byref(args)))


class PlannedStep:
    """A step that is kept: see ops.PlannedStep."""

    def __init__(self, param: Tensor, first: First, second: Second, num_steps: Tensor) -> None:
        self._args = _host_step(param, param, None, Rule(0.0), first, second)
        self._args.num_steps = num_steps.data_ptr()
        self._num_steps = ctypes.c_float.from_address(num_steps.data_ptr())
        self._address = ctypes.addressof(self._args)

    @property
    def num_steps(self) -> int:
        return int(self._num_steps.value)

    def set(
        self,
        rule: Rule,
        values: Tensor,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        args, positions = self._args, indices if rows is None else rows
        args.grad = values.data_ptr()
        args.rule = rule
        args.is_elements = indices is not None
        if positions is None:
            args.at, args.k = None, args.n
        else:
            args.at, args.k = positions.data_ptr(), positions.shape[0]

    @staticmethod
    def find_wrong_positions(steps: Sequence[PlannedStep]) -> int | None:
        wrong = host_library().parsimony_wrong_positions(_addresses(steps), _i64(len(steps)))
        return None if wrong < 0 else wrong

    @staticmethod
    def run(steps: Sequence[PlannedStep]) -> None:
        threads = _int(torch.get_num_threads())
        _check(host_library().parsimony_step_all(_addresses(steps), _i64(len(steps)), threads))


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    args = _host_step(param, values, indices, rule, first, second)
    _check(host_library().parsimony_step_elements(ctypes.byref(args)))


def observe(given: Sequence[Observation]) -> None:
    for observed, grad, rule, scale in given:
        scaled = Rule.from_buffer_copy(rule)
        scaled.sign, scaled.weight_decay = 1.0 if scale is None else float(scale), 0.0
        # Without weight decay no parameter is read; grad takes its place.
        args = _host_step(grad, grad, None, scaled, None, observed.second)
        _check(host_library().parsimony_observe(ctypes.byref(args)))


def roots(asked: Sequence[Root], positions_K: Tensor) -> Tensor:
    found = torch.empty(positions_K.shape, dtype=torch.float32, device="cpu")
    there = rootings(asked)
    given = Rootings(ctypes.addressof(there), len(asked), positions_K.data_ptr(), found.data_ptr())
    host_library().parsimony_roots(ctypes.byref(given))
    return found


def sqrt_(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        return x.copy_(sqrt_(x.contiguous()))
    threads = _int(torch.get_num_threads())
    host_library().parsimony_sqrt(_at(x), _i64(x.numel()), threads)
    return x


def _addresses(steps: Sequence[PlannedStep]) -> ctypes.Array:
    return (_pointer * len(steps))(*[step._address for step in steps])


def _check(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for a step; parameter and state may be half updated")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return _pointer(tensor.data_ptr())


def _host_step(
    param: Tensor, grad: Tensor, at: Tensor | None, rule: Rule, first: First, second: Second
) -> HostStep:
    args = HostStep(
        param=param.data_ptr(), grad=grad.data_ptr(), at=None if at is None else at.data_ptr(),
        n=param.shape[0], m=param.shape[1], k=grad.shape[0],
        storage=Storage.of(param.dtype), first=FirstKind.of(first),
        second=SecondKind.of(second), threads=torch.get_num_threads(), rule=rule,
    )  # fmt: skip
    match first:
        case Full() | MomentOfUpdates():
            args.first_values = first.values.data_ptr()
        case Table():
            args.first_sketch = Sketch.of(first)
    match second:
        case Full():
            args.second_values = second.values.data_ptr()
        case Cover() | Factored():
            args.row, args.col = second.row.data_ptr(), second.col.data_ptr()
        case Table():
            args.second_sketch = Sketch.of(second)
    return args
