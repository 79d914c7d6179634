"""The operations in CUDA: what device.cu needs, laid out, and the launches in their order.

Arguments were checked by ops.py. Work goes to torch's current stream of the tensors'
device, and nothing here waits for it. Temporaries: for rows, n + m numbers (Cover) or a 32nd of the
parameter (Factored; more where it is small); for a sketch, a few numbers for each arriving row and,
where it decays or is of a first moment, new values of the buckets that change; for elements, a few
numbers each.

Shapes: n rows of m columns make the parameter; k rows or elements of it arrive.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import COLUMNS, THREADS, CuPyLauncher, Launcher
from parsimony_kernels.runtime.operands import (
    MAX_DEPTH,
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

# A tile's threads take up to MAX_ROWS_PER_THREAD rows, so that maxima and sums leave a block
# seldom, but fewer where there would be fewer tiles than WANTED_TILES, too few to fill a GPU.
MAX_ROWS_PER_THREAD = 16
WANTED_TILES = 512
MAX_BLOCKS = 2**20  # kernels stride over what is more

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NO_RULE = Rule(lr=0.0)
(_SOURCE_VALUES, _SOURCE_GRADIENT, _SOURCE_SQUARE) = range(3)

launcher: Launcher = CuPyLauncher()  # tests put an emulator here


# ---- what kernels are given: the structures of device.cu -----------------------------------------


class _Tiling(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_columns", "num_tiles")),
        *((name, c_int) for name in ("lanes", "rows_per_thread")),
    )

    def __init__(self, num_rows: int, num_columns: int) -> None:
        lanes = 1
        while lanes < 32 and lanes * COLUMNS < num_columns:
            lanes *= 2
        slots, across = THREADS // lanes, -(-num_columns // (lanes * COLUMNS))
        num_tiles = across * -(-num_rows // slots)
        per_thread = max(1, min(MAX_ROWS_PER_THREAD, num_tiles // WANTED_TILES))
        num_tiles = across * -(-num_rows // (slots * per_thread))
        super().__init__(num_rows, num_columns, num_tiles, lanes, per_thread)

    @property
    def across(self) -> int:
        return -(-self.num_columns // (self.lanes * COLUMNS))


class _Items(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_items", "num_rows", "dim")),
        *((name, c_void_p) for name in ("positions", "param", "grad", "scale")),
        *((name, c_int) for name in ("is_elements", "is_dense")),
    )


class _Sketch(ctypes.Structure):
    _fields_ = (
        ("values", c_void_p),
        ("width", c_int64),
        ("dim", c_int64),
        ("seeds", c_int64 * MAX_DEPTH),
        ("depth", c_int),
        ("is_signed", c_int),
    )

    def __init__(self, table: Table) -> None:
        depth, width, dim = table.values.shape
        seeds = (c_int64 * MAX_DEPTH)(*table.seeds.tolist())
        super().__init__(table.values.data_ptr(), width, dim, seeds, depth, table.signed)


class Argument(ctypes.Structure):
    """A kernel's one argument; keeps the tensors that it points to."""

    def point(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.data_ptr())
        self.kept = {**getattr(self, "kept", {}), **tensors}


class Feeding(Argument):
    _fields_ = (
        ("rule", Rule),
        ("items", _Items),
        ("tiling", _Tiling),
        ("sketch", _Sketch),
        ("source", c_int),
        *((name, c_float) for name in ("gain", "decay", "keep")),
        *((name, c_void_p) for name in ("cells", "order", "ranks", "fresh", "estimates")),
    )


class Stepping(Argument):
    _fields_ = (
        ("rule", Rule),
        ("items", _Items),
        ("tiling", _Tiling),
        ("first", c_int),
        ("second", c_int),
        ("first_values", c_void_p),
        ("second_values", c_void_p),
        ("first_sketch", _Sketch),
        ("second_sketch", _Sketch),
        *((name, c_void_p) for name in ("row", "col", "row_max", "col_max", "averages")),
        *((name, c_void_p) for name in ("row_sums", "col_sums", "mean", "changes")),
        *((name, c_void_p) for name in ("keys", "order", "means")),
        ("share", c_int64),
    )


def _launch(name: str, argument: Argument, device: torch.device, flat: int | None = None) -> None:
    """Launch over `flat` items, or over the tiles."""
    blocks = argument.tiling.num_tiles if flat is None else -(-flat // THREADS)
    launcher.launch(name, max(1, min(blocks, MAX_BLOCKS)), argument, device)


# ---- sketches ------------------------------------------------------------------------------------


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    dim = table.values.shape[2]
    estimates = table.values.new_empty(len(rows), dim)
    if estimates.numel() > 0:
        items = _Items(num_items=len(rows), dim=dim, positions=rows.data_ptr())
        query = Feeding(items=items, tiling=_Tiling(len(rows), dim), sketch=_Sketch(table))
        query.point(estimates=estimates)
        _launch("sketch_query", query, rows.device)
    return estimates


def sketch_update(table: Table, rows: Tensor, values: Tensor, gain: float, decay: float) -> None:
    items = _Items(num_items=len(rows), dim=values.shape[1])
    items.positions, items.grad = rows.data_ptr(), values.data_ptr()
    scalars = {"gain": gain, "decay": decay, "keep": 1.0}
    feeding = Feeding(rule=_NO_RULE, items=items, source=_SOURCE_VALUES, **scalars)
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
    feeding.sketch, feeding.tiling = _Sketch(table), _Tiling(num_entries, num_columns)
    feeding.point(cells=torch.empty(num_entries, dtype=torch.int64, device=device))
    _launch("sketch_cells", feeding, device, flat=num_entries)
    cells, order = feeding.kept["cells"].sort(stable=True)
    feeding.point(cells=cells, order=order)
    if is_stored and not feeding.decay:
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
    stepping: Stepping, first: First, second: Second, dtype: str, is_whole: bool = True
) -> Feeding | None:
    """Feed the gradient to the moments that are sketches, both before the parameter moves.

    is_whole: all rows, or elements, have arrived.
    Returns: the first moment's feeding, to be stored after the step, which reads the old values.
    """
    rule, kernel = stepping.rule, f"sketch_update_{dtype}"
    if isinstance(second, Table):
        scalars = {"gain": rule.second_gain, "decay": rule.second_decay, "keep": 1.0}
        feeding = Feeding(rule, stepping.items, source=_SOURCE_SQUARE, **scalars)
        _feed(second, feeding, kernel)
    if not isinstance(first, Table):
        return None
    scalars = {"gain": rule.first_gain, "decay": rule.first_decay, "keep": 1.0}
    if is_whole:  # all that it holds decays alike
        scalars |= {"decay": 0.0, "keep": rule.first_beta}
    feeding = Feeding(rule, stepping.items, source=_SOURCE_GRADIENT, **scalars)
    _feed(first, feeding, kernel, is_stored=False)
    return feeding


# ---- steps ---------------------------------------------------------------------------------------


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    stepping = _stepping(rule, first, second)
    stepping.items = _Items(len(grad), *param.shape, is_dense=rows is None)
    stepping.items.param, stepping.items.grad = param.data_ptr(), grad.data_ptr()
    if rows is not None:
        stepping.items.positions = rows.data_ptr()
    stepping.tiling = _Tiling(*grad.shape)
    dtype, device = _TYPES[param.dtype], param.device
    unstored = _feed_moments(stepping, first, second, dtype, len(grad) == len(param))
    is_one_pass = stepping.second == SecondKind.COVER
    if is_one_pass:
        _make_maxima(stepping, device)
    elif isinstance(second, Cover):
        _cover_rows(stepping, grad)
    elif isinstance(second, Factored):
        _factor_rows(stepping, second, grad)
        stepping.point(mean=_mean(second.col))
    is_sketched = isinstance(first, Table) or isinstance(second, Table)
    kind = "sketch_" if is_sketched else "cover_" if is_one_pass else ""
    _launch(f"step_{kind}{dtype}", stepping, device)
    if unstored:
        _launch("sketch_store", unstored, device)
    if is_one_pass:
        _launch("cover_store", stepping, device, flat=sum(grad.shape))


def observe(grad: Tensor, rule: Rule, second: Second, scale: Tensor | None) -> None:
    scalars = ("second_beta", "second_gain", "second_decay")
    rule = Rule(lr=0.0, **{name: getattr(rule, name) for name in scalars})
    stepping = _stepping(rule, None, second)
    stepping.items = _Items(len(grad), *grad.shape, grad=grad.data_ptr(), is_dense=True)
    if scale is not None:
        stepping.items.scale = scale.data_ptr()
    stepping.tiling = _Tiling(*grad.shape)
    dtype = _TYPES[grad.dtype]
    match second:
        case Full():
            _launch(f"observe_full_{dtype}", stepping, grad.device, flat=grad.numel())
        case Cover():
            _cover_rows(stepping, grad)
        case Factored():
            _factor_rows(stepping, second, grad)
        case Table():
            _feed_moments(stepping, None, second, dtype)


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    stepping = _stepping(rule, first, second)
    stepping.items = _Items(len(values), *param.shape, is_elements=True)
    stepping.items.param, stepping.items.grad = param.data_ptr(), values.data_ptr()
    stepping.items.positions = indices.data_ptr()
    dtype, device, num_items = _TYPES[param.dtype], param.device, len(values)
    unstored = _feed_moments(stepping, first, second, dtype, num_items == param.numel())
    if isinstance(second, Cover):
        stepping.point(averages=values.new_empty(2, num_items))
    if stepping.second == SecondKind.COVER_I:
        _launch(f"cover_averages_{dtype}", stepping, device, flat=num_items)
        _launch("cover_raise", stepping, device, flat=num_items)
    elif isinstance(second, Factored):
        _factor_elements(stepping, second, indices, dtype)
    _launch(f"step_elements_{dtype}", stepping, device, flat=num_items)
    if unstored:
        _launch("sketch_store", unstored, device)
    if stepping.second == SecondKind.COVER:
        _launch("cover_raise", stepping, device, flat=num_items)


def _stepping(rule: Rule, first: First, second: Second) -> Stepping:
    stepping = Stepping(rule=rule, first=FirstKind.of(first), second=SecondKind.of(second))
    match first:
        case Full() | Velocity():
            stepping.point(first_values=first.values)
        case Table():
            stepping.first_sketch = _Sketch(first)
    match second:
        case Full():
            stepping.point(second_values=second.values)
        case Cover() | Factored():
            stepping.point(row=second.row, col=second.col)
        case Table():
            stepping.second_sketch = _Sketch(second)
    return stepping


def _make_maxima(stepping: Stepping, device: torch.device) -> None:
    num_items, dim = stepping.items.num_items, stepping.items.dim
    maxima = torch.zeros(num_items + dim, dtype=torch.int32, device=device)
    stepping.point(row_max=maxima[:num_items], col_max=maxima[num_items:])


def _cover_rows(stepping: Stepping, grad: Tensor) -> None:
    """Bring the accumulators up to this step's, in a pass over the gradient alone."""
    _make_maxima(stepping, grad.device)
    _launch(f"cover_maxima_{_TYPES[grad.dtype]}", stepping, grad.device)
    _launch("cover_store", stepping, grad.device, flat=sum(grad.shape))


def _mean(col: Tensor) -> Tensor:
    return col.mean(dtype=torch.float64).float()


def _factor_rows(stepping: Stepping, second: Factored, grad: Tensor) -> None:
    """Bring the means up to this step's; the order of the sums follows from the shape."""
    tiling = stepping.tiling
    across, down = tiling.across, tiling.num_tiles // tiling.across
    row_sums = second.row.new_empty(across, len(grad), dtype=torch.float64)
    col_sums = second.col.new_empty(down, grad.shape[1], dtype=torch.float64)
    stepping.point(row_sums=row_sums, col_sums=col_sums, mean=_mean(second.col))
    _launch(f"factored_sums_{_TYPES[grad.dtype]}", stepping, grad.device)
    _launch("factored_store", stepping, grad.device, flat=sum(grad.shape))


def _factor_elements(stepping: Stepping, second: Factored, indices: Tensor, dtype: str) -> None:
    num_items, device = len(indices), indices.device
    changes = indices.new_empty(num_items, dtype=torch.float64)
    stepping.point(changes=changes, mean=_mean(second.col))
    _launch(f"factored_changes_{dtype}", stepping, device, flat=num_items)
    n, m = len(second.row), len(second.col)
    for means, at, share in ((second.row, indices // m, m), (second.col, indices % m, n)):
        keys, order = at.sort(stable=True)
        stepping.point(keys=keys, order=order, means=means)
        stepping.share = share
        _launch("factored_raise", stepping, device, flat=num_items)
    stepping.point(mean=_mean(second.col))
