"""Checks of what operations take: types, shapes, devices and positions, before they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from parsimony_kernels.runtime.operands import (
    MAX_DEPTH,
    MAX_ROWS,
    STATE_DTYPES,
    STEP_DTYPES,
    Cover,
    Factored,
    First,
    Full,
    MomentOfUpdates,
    Second,
    Table,
    state_dtype,
)

_STATE = {dtype: (state_dtype(dtype),) for dtype in STEP_DTYPES}  # what a parameter's state may be


def check_tensor(
    name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], dim: int
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {dim} dimensions")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {device}, as the other tensors")
    if tensor.numel() and tensor.device.type in ("cpu", "cuda") and tensor.data_ptr() == 0:
        raise ValueError(f"{name} is a {type(tensor).__name__} without memory of its own; allowed: "
                         "plain tensors (of a DTensor, its local part)")  # fmt: skip
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; allowed: contiguous (.contiguous())"
        )


def check_shape(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    check_tensor(name, tensor, device, dtypes, len(shape))
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {shape}")


def check_parameter(param: Tensor, grad: Tensor, rows: Tensor | None) -> None:
    check_tensor("param", param, param.device, STEP_DTYPES, 2)
    check_tensor("grad", grad, param.device, STEP_DTYPES, 2)
    num_rows = param.shape[0]
    check_num_rows(param)
    if rows is not None:
        num_rows = rows.shape[0]
        _check_positions("rows", rows, num_rows, param.shape[0], param.device)
    if tuple(grad.shape) != (num_rows, param.shape[1]):
        allowed = (num_rows, param.shape[1])
        raise ValueError(f"grad has shape {tuple(grad.shape)}; allowed: {allowed}")


def check_num_rows(param: Tensor) -> None:
    if param.shape[0] > MAX_ROWS:
        raise ValueError(f"param has {param.shape[0]} rows; allowed: up to {MAX_ROWS}")


def check_elements(values: Tensor, indices: Tensor, param: Tensor) -> None:
    """Raise ValueError unless these are elements of a parameter of any shape: see step_elements."""
    check_tensor("values", values, param.device, (state_dtype(param.dtype),), 1)
    _check_positions("indices", indices, values.shape[0], param.numel(), param.device)


_is_trusted: ContextVar[bool] = ContextVar("are positions trusted", default=False)


@contextmanager
def trusted_positions() -> Iterator[None]:
    """In the block, of this thread, positions are known to ascend, to be unique and in range: they
    have been checked where they arrived, and are not read again, which would wait for a GPU."""
    token = _is_trusted.set(True)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def are_trusted() -> bool:
    """Tell whether this is in a block of `trusted_positions`."""
    return _is_trusted.get()


def _check_positions(
    name: str, positions: Tensor, length: int, bound: int, device: torch.device
) -> None:
    """Ascending, unique and in range. On a GPU this waits for it, unless they are trusted."""
    check_tensor(name, positions, device, (torch.int64,), 1)
    if positions.shape[0] != length:
        raise ValueError(f"{name} has {positions.shape[0]} entries for {length} values")
    if length == 0 or _is_trusted.get():
        return
    if int(positions[0]) < 0 or int(positions[-1]) >= bound:
        raise ValueError(f"{name} lie in {int(positions[0])}..{int(positions[-1])}; allowed: "
                         f"0..{bound - 1}")  # fmt: skip
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"{name} are not ascending and unique; coalesce the gradient first")


def check_rows(
    rows: Tensor,
    values: Tensor | None,
    dtype: torch.dtype = torch.float32,
    bound: int = MAX_ROWS,
    name: str = "rows",
) -> None:
    """Rows of a sketch: any order, repeats allowed; values in the sketch's dtype."""
    check_tensor(name, rows, rows.device, (torch.int64,), 1)
    are_read = rows.numel() and not _is_trusted.get()
    if are_read and (int(rows.min()) < 0 or int(rows.max()) >= bound):
        raise ValueError(f"{name} lie in {int(rows.min())}..{int(rows.max())}; allowed: "
                         f"0..{bound - 1}")  # fmt: skip
    if values is not None:
        check_tensor("values", values, rows.device, (dtype,), 2)
        if values.shape[0] != rows.shape[0]:
            raise ValueError(f"{rows.shape[0]} rows for {values.shape[0]} rows of values")


def check_table(
    table: Table,
    num_columns: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = STATE_DTYPES,
) -> None:
    check_tensor("table", table.values, device, dtypes, 3)
    depth, width, dim = table.values.shape
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"the sketch has depth {depth}; allowed: 1 to {MAX_DEPTH}")
    if not 1 <= width < MAX_ROWS:
        raise ValueError(f"the sketch has width {width}; allowed: 1 to {MAX_ROWS - 1}")
    if dim != num_columns:
        raise ValueError(f"the sketch has dim {dim}; allowed: {num_columns}, as the rows")
    check_tensor("seeds", table.seeds, torch.device("cpu"), (torch.int64,), 1)
    if table.seeds.shape[0] != depth:
        raise ValueError(
            f"the sketch has {table.seeds.shape[0]} seeds; allowed: its depth, {depth}"
        )


def check_first(first: First, param: Tensor) -> None:
    dtypes = _STATE[param.dtype]
    match first:
        case Full() | MomentOfUpdates():
            check_shape("first moment", first.values, tuple(param.shape), param.device, dtypes)
        case Table():
            check_table(first, param.shape[1], param.device, dtypes)
            if not first.signed:
                raise ValueError("a first moment has both signs; its sketch must be signed")


def check_second(second: Second, param: Tensor) -> None:
    dtypes = _STATE[param.dtype]
    match second:
        case Full():
            check_shape("second moment", second.values, tuple(param.shape), param.device, dtypes)
        case Cover() | Factored():
            check_shape("row", second.row, (param.shape[0],), param.device, dtypes)
            check_shape("col", second.col, (param.shape[1],), param.device, dtypes)
            if isinstance(second, Cover) and second.variant not in ("I", "II"):
                raise ValueError(f"SM3 variant {second.variant!r}; allowed: I, II")
        case Table():
            check_table(second, param.shape[1], param.device, dtypes)
            if second.signed:
                raise ValueError("a second moment's sketch is a count-min sketch, without signs")
