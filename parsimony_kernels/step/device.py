"""The operations in CUDA: the arguments of device.cu's kernels, and their launches in order.

ops.py has checked what is given. Work goes to torch's current stream of the tensors' device, and
nothing here waits for it. Temporaries: for rows, n + m numbers (Cover) or a 32nd of the
parameter (Factored; more where it is small); for a sketch, a few numbers for each arriving row and
new values of the buckets that change; for elements, a few numbers each.

Shapes: n rows of m columns make the parameter; k rows or elements of it arrive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import THREADS, Argument, launch
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
    Table,
)
from parsimony_kernels.step.arguments import DeviceStep, Feeding, Inserted, Items, Tiling

MAX_BLOCKS = 2**20  # kernels stride over what is more

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NO_RULE = Rule(lr=0.0)


def _launch(name: str, argument: Argument, device: torch.device, flat: int | None = None) -> None:
    """Launch over `flat` items, or over the tiles."""
    blocks = argument.tiling.num_tiles if flat is None else -(-flat // THREADS)
    launch(name, max(1, min(blocks, MAX_BLOCKS)), argument, device)


# ---- sketches ------------------------------------------------------------------------------------


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    dim = table.values.shape[2]
    estimates = table.values.new_empty(len(rows), dim)
    if estimates.numel() > 0:
        items = Items(num_items=len(rows), dim=dim, positions=rows.data_ptr())
        query = Feeding(items=items, tiling=Tiling(len(rows), dim), sketch=Sketch.of(table))
        query.point(estimates=estimates)
        _launch("sketch_query", query, rows.device)
    return estimates


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, gain: float, forgetting: float
) -> None:
    items = Items(num_items=len(rows), dim=values.shape[1])
    items.positions, items.grad = rows.data_ptr(), values.data_ptr()
    scalars = {"gain": gain, "forgetting": forgetting, "keep": 1.0}
    feeding = Feeding(rule=_NO_RULE, items=items, inserted=Inserted.VALUES, **scalars)
    _feed(table, feeding, "sketch_update_f32")


def _feed(table: Table, feeding: Feeding, kernel: str, *, is_stored: bool = True) -> None:
    """Insert what `feeding` describes; see sketch_update in device.cu.

    Unless `is_stored`, the table stays as it was until sketch_store is launched.
    """
    depth, width, dim = table.values.shape
    device, items = table.values.device, feeding.items
    num_columns = 1 if items.is_elements else dim
    num_entries = depth * items.num_items
    if num_entries * num_columns == 0:
        return
    feeding.sketch, feeding.tiling = Sketch.of(table), Tiling(num_entries, num_columns)
    feeding.point(cells=torch.empty(num_entries, dtype=torch.int64, device=device))
    _launch("sketch_cells", feeding, device, flat=num_entries)
    cells, order = feeding.kept["cells"].sort(stable=True)
    feeding.point(cells=cells, order=order)
    if is_stored and not feeding.forgetting:
        _launch(kernel, feeding, device)
        return
    is_first = torch.ones_like(cells, dtype=torch.bool)
    torch.ne(cells[1:], cells[:-1], out=is_first[1:])
    most = min(num_entries, depth * width * dim // num_columns)
    feeding.point(ranks=is_first.cumsum(0), fresh=table.values.new_empty(most, num_columns))
    _launch(kernel, feeding, device)
    if is_stored:
        _launch("sketch_store", feeding, device)


def _feed_moments(
    work: DeviceStep, first: First, second: Second, dtype: str, is_whole: bool = True
) -> list[Feeding]:
    """Feed the gradient to the moments that are sketches, before the parameter moves.

    is_whole: all rows, or elements, have arrived.
    Returns: the feedings, to be stored after the step, which reads the old values.
    """
    rule, kernel, feedings = work.rule, f"sketch_update_{dtype}", []
    if isinstance(second, Table):
        scalars = {"gain": rule.second_gain, "forgetting": rule.second_forgetting, "keep": 1.0}
        feedings.append(Feeding(rule, work.items, inserted=Inserted.SQUARE, **scalars))
        _feed(second, feedings[-1], kernel, is_stored=False)
    if isinstance(first, Table):
        scalars = {"gain": rule.first_gain, "forgetting": rule.first_forgetting, "keep": 1.0}
        if is_whole:  # the whole table is scaled instead
            scalars |= {"forgetting": 0.0, "keep": rule.first_beta}
        feedings.append(Feeding(rule, work.items, inserted=Inserted.GRADIENT, **scalars))
        _feed(first, feedings[-1], kernel, is_stored=False)
    return feedings


# ---- steps ---------------------------------------------------------------------------------------


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    work = _device_step(rule, first, second)
    work.items = Items(len(grad), *param.shape, is_dense=rows is None)
    work.items.param, work.items.grad = param.data_ptr(), grad.data_ptr()
    if rows is not None:
        work.items.positions = rows.data_ptr()
    work.tiling = Tiling(*grad.shape)
    dtype, device = _TYPES[param.dtype], param.device
    unstored = _feed_moments(work, first, second, dtype, len(grad) == len(param))
    is_one_pass = work.second == SecondKind.COVER
    if is_one_pass:
        _make_maxima(work, device)
    elif isinstance(second, Cover):
        _cover_rows(work, grad)
    elif isinstance(second, Factored):
        _factor_rows(work, second, grad)
        work.point(mean=_mean(second.col))
    is_sketched = isinstance(first, Table) or isinstance(second, Table)
    kind = "sketch_" if is_sketched else "cover_" if is_one_pass else ""
    _launch(f"step_{kind}{dtype}", work, device)
    for feeding in unstored:
        _launch("sketch_store", feeding, device)
    if is_one_pass:
        _launch("cover_store", work, device, flat=sum(grad.shape))


def observe(grad: Tensor, rule: Rule, second: Second, scale: Tensor | None) -> None:
    scalars = ("second_beta", "second_gain", "second_forgetting")
    rule = Rule(lr=0.0, **{name: getattr(rule, name) for name in scalars})
    work = _device_step(rule, None, second)
    work.items = Items(len(grad), *grad.shape, grad=grad.data_ptr(), is_dense=True)
    if scale is not None:
        work.items.scale = scale.data_ptr()
    work.tiling = Tiling(*grad.shape)
    dtype = _TYPES[grad.dtype]
    match second:
        case Full():
            _launch(f"observe_full_{dtype}", work, grad.device, flat=grad.numel())
        case Cover():
            _cover_rows(work, grad)
        case Factored():
            _factor_rows(work, second, grad)
        case Table():
            for feeding in _feed_moments(work, None, second, dtype):
                _launch("sketch_store", feeding, grad.device)


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    work = _device_step(rule, first, second)
    work.items = Items(len(values), *param.shape, is_elements=True)
    work.items.param, work.items.grad = param.data_ptr(), values.data_ptr()
    work.items.positions = indices.data_ptr()
    dtype, device, num_items = _TYPES[param.dtype], param.device, len(values)
    unstored = _feed_moments(work, first, second, dtype, num_items == param.numel())
    if isinstance(second, Cover):
        work.point(averages=values.new_empty(2, num_items))
    if work.second == SecondKind.COVER_I:
        _launch(f"cover_averages_{dtype}", work, device, flat=num_items)
        _launch("cover_raise", work, device, flat=num_items)
    elif isinstance(second, Factored):
        _factor_elements(work, second, indices, dtype)
    _launch(f"step_elements_{dtype}", work, device, flat=num_items)
    for feeding in unstored:
        _launch("sketch_store", feeding, device)
    if work.second == SecondKind.COVER:
        _launch("cover_raise", work, device, flat=num_items)


def _device_step(rule: Rule, first: First, second: Second) -> DeviceStep:
    work = DeviceStep(rule=rule, first=FirstKind.of(first), second=SecondKind.of(second))
    match first:
        case Full() | MomentOfUpdates():
            work.point(first_values=first.values)
        case Table():
            work.first_sketch = Sketch.of(first)
    match second:
        case Full():
            work.point(second_values=second.values)
        case Cover() | Factored():
            work.point(row=second.row, col=second.col)
        case Table():
            work.second_sketch = Sketch.of(second)
    return work


def _make_maxima(work: DeviceStep, device: torch.device) -> None:
    num_items, dim = work.items.num_items, work.items.dim
    maxima = torch.zeros(num_items + dim, dtype=torch.int32, device=device)
    work.point(row_max=maxima[:num_items], col_max=maxima[num_items:])


def _cover_rows(work: DeviceStep, grad: Tensor) -> None:
    """Bring the accumulators up to this step's, in a pass over the gradient alone."""
    _make_maxima(work, grad.device)
    _launch(f"cover_maxima_{_TYPES[grad.dtype]}", work, grad.device)
    _launch("cover_store", work, grad.device, flat=sum(grad.shape))


def _mean(col: Tensor) -> Tensor:
    return col.mean(dtype=torch.float64).float()


def _factor_rows(work: DeviceStep, second: Factored, grad: Tensor) -> None:
    """Bring the means up to this step's; the order of the sums follows from the shape."""
    tiling = work.tiling
    across, down = tiling.across, tiling.num_tiles // tiling.across
    row_sums = second.row.new_empty(across, len(grad), dtype=torch.float64)
    col_sums = second.col.new_empty(down, grad.shape[1], dtype=torch.float64)
    work.point(row_sums=row_sums, col_sums=col_sums, mean=_mean(second.col))
    _launch(f"factored_sums_{_TYPES[grad.dtype]}", work, grad.device)
    _launch("factored_store", work, grad.device, flat=sum(grad.shape))


def _factor_elements(work: DeviceStep, second: Factored, indices: Tensor, dtype: str) -> None:
    num_items, device = len(indices), indices.device
    changes = indices.new_empty(num_items, dtype=torch.float64)
    work.point(changes=changes, mean=_mean(second.col))
    _launch(f"factored_changes_{dtype}", work, device, flat=num_items)
    n, m = len(second.row), len(second.col)
    for means, at, num_averaged in ((second.row, indices // m, m), (second.col, indices % m, n)):
        keys, order = at.sort(stable=True)
        work.point(keys=keys, order=order, means=means)
        work.num_averaged = num_averaged
        _launch("factored_raise", work, device, flat=num_items)
    work.point(mean=_mean(second.col))
