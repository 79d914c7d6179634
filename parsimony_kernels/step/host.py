"""The operations for CPU tensors, by host.cpp. Arguments were checked by ops.py."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from parsimony_kernels.runtime.build import host_library
from parsimony_kernels.runtime.operands import (
    PARAMETER_DTYPES,
    Cover,
    Factored,
    First,
    FirstKind,
    Full,
    Rule,
    Second,
    SecondKind,
    Table,
    Velocity,
)

_pointer, _i64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _SketchArgs(ctypes.Structure):
    _fields_ = [("values", _pointer), ("seeds", _pointer), ("depth", _i64), ("width", _i64)]


class _StepArgs(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("param", "grad", "at")),
        *((name, _i64) for name in ("n", "m", "k")),
        *((name, _int) for name in ("dtype", "first", "second", "threads")),
        *((name, _pointer) for name in ("first_values", "second_values", "row", "col")),
        *((name, _SketchArgs) for name in ("first_table", "second_table")),
        ("rule", Rule),
    ]


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_update(table: Table, rows: Tensor, values: Tensor, gain: float, decay: float) -> None:
    status = _library().parsimony_sketch_update(
        ctypes.byref(_sketch_args(table)), _int(table.signed), _i64(values.shape[1]),
        _at(rows), _at(values), _i64(len(rows)),
        ctypes.c_float(gain), ctypes.c_float(decay), _int(torch.get_num_threads()),
    )  # fmt: skip
    _check(status)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    out = torch.empty(len(rows), table.values.shape[2], dtype=torch.float32, device="cpu")
    _library().parsimony_sketch_query(
        ctypes.byref(_sketch_args(table)), _int(table.signed), _i64(out.shape[1]),
        _at(rows), _at(out), _i64(len(rows)), _int(torch.get_num_threads()),
    )  # fmt: skip
    return out


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    args = _step_args(param, grad, rows, rule, first, second)
    _check(_library().parsimony_step(ctypes.byref(args)))


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    args = _step_args(param, values, indices, rule, first, second)
    _check(_library().parsimony_step_elements(ctypes.byref(args)))


def observe(grad: Tensor, rule: Rule, second: Second, scale: Tensor | None) -> None:
    scaled = Rule.from_buffer_copy(rule)
    scaled.sign, scaled.weight_decay = 1.0 if scale is None else float(scale), 0.0
    # grad stands for param, too: without weight decay nothing reads it
    args = _step_args(grad, grad, None, scaled, None, second)
    _check(_library().parsimony_observe(ctypes.byref(args)))


@functools.cache
def _library() -> ctypes.CDLL:
    library = host_library()
    library.parsimony_sizes.restype = _i64
    for which, ours in enumerate((_StepArgs, _SketchArgs)):
        assert library.parsimony_sizes(which) == ctypes.sizeof(ours)
    return library


def _check(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for a step; parameter and state may be half updated")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return _pointer(tensor.data_ptr())


def _sketch_args(table: Table) -> _SketchArgs:
    depth, width, _ = table.values.shape
    return _SketchArgs(table.values.data_ptr(), table.seeds.data_ptr(), depth, width)


def _step_args(
    param: Tensor, grad: Tensor, at: Tensor | None, rule: Rule, first: First, second: Second
) -> _StepArgs:
    args = _StepArgs(
        param=param.data_ptr(), grad=grad.data_ptr(), at=None if at is None else at.data_ptr(),
        n=param.shape[0], m=param.shape[1], k=grad.shape[0],
        dtype=PARAMETER_DTYPES.index(param.dtype), first=FirstKind.of(first),
        second=SecondKind.of(second), threads=torch.get_num_threads(), rule=rule,
    )  # fmt: skip
    match first:
        case Full() | Velocity():
            args.first_values = first.values.data_ptr()
        case Table():
            args.first_table = _sketch_args(first)
    match second:
        case Full():
            args.second_values = second.values.data_ptr()
        case Cover() | Factored():
            args.row, args.col = second.row.data_ptr(), second.col.data_ptr()
        case Table():
            args.second_table = _sketch_args(second)
    return args
