"""What the kernels of a step are given, on the host and on the device: see abi.h."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import COLUMNS, THREADS, Argument
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

# A tile's threads take up to MAX_ROWS_PER_THREAD rows each, so that blocks seldom write maxima and
# sums. They take fewer rows if there would be less than WANTED_TILES tiles, too few to fill a GPU.
MAX_ROWS_PER_THREAD = 16
WANTED_TILES = 128

_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class HostStep(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("param", "grad", "at")),
        *((name, c_int64) for name in ("n", "m", "k")),
        *((name, c_int) for name in ("storage", "first", "second", "threads", "is_elements")),
        *((name, c_void_p) for name in ("first_values", "second_values", "row", "col")),
        *((name, Sketch) for name in ("first_sketch", "second_sketch")),
        ("rule", Rule),
        ("num_steps", c_void_p),
    ]


class Tiling(Structure):
    """How a kernel divides rows and columns into tiles: see device_tiles.h.

    It is packed if a thread's columns are neighbours.
    """

    _fields_ = (
        *((name, c_int64) for name in ("num_rows", "num_columns", "num_tiles")),
        *((name, c_int) for name in ("lanes", "rows_per_thread", "is_packed")),
    )

    def __init__(self, num_rows: int, num_columns: int, *, is_packed: bool = False) -> None:
        lanes = 1
        while lanes < 32 and lanes * COLUMNS < num_columns:
            lanes *= 2
        slots, across = THREADS // lanes, -(-num_columns // (lanes * COLUMNS))
        num_tiles = across * -(-num_rows // slots)
        per_thread = max(1, min(MAX_ROWS_PER_THREAD, num_tiles // WANTED_TILES))
        num_tiles = across * -(-num_rows // (slots * per_thread))
        super().__init__(num_rows, num_columns, num_tiles, lanes, per_thread, is_packed)

    @classmethod
    def flat(cls, numel: int) -> Tiling:
        """Return tiles of elements that share no state, whatever the tensor's shape."""
        return cls(-(-numel // (32 * COLUMNS)), 32 * COLUMNS, is_packed=True)

    @property
    def across(self) -> int:
        return -(-self.num_columns // (self.lanes * COLUMNS))


class Items(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_items", "num_rows", "dim")),
        *((name, c_void_p) for name in ("positions", "param", "grad", "scale")),
        *((name, c_int) for name in ("is_elements", "is_dense", "is_aligned")),
    )


class Inserted(IntEnum):
    """What is inserted into a sketch: values as they are, the gradient, or its square."""

    VALUES = 0
    GRADIENT = 1
    SQUARE = 2


class Feeding(Argument):
    """What is inserted into a sketch: keep * table + gain * x - forgetting * estimate.

    dtype: of the gradient. num_entries: depth * items; num_cells: of the sketch that they fall
    into, a bucket each, or for elements a number; num_columns: of such a cell.
    """

    _fields_ = (
        ("rule", Rule),
        ("items", Items),
        ("tiling", Tiling),
        ("sketch", Sketch),
        ("inserted", c_int),
        *((name, c_float) for name in ("gain", "forgetting", "keep")),
        *((name, c_void_p) for name in ("cells", "sorted", "order", "ranks")),
        *((name, c_int64) for name in ("first_cell", "first_entry")),
        ("fresh", c_void_p),
    )

    def __init__(
        self,
        table: Table,
        items: Items,
        dtype: str,
        inserted: Inserted,
        rule: Rule,
        gain: float,
        forgetting: float,
        keep: float,
    ) -> None:
        depth, width, dim = table.values.shape
        self.dtype, self.num_entries = dtype, depth * items.num_items
        self.num_columns = 1 if items.is_elements else dim
        self.num_cells = depth * width * (dim if items.is_elements else 1)
        scalars = {"gain": gain, "forgetting": forgetting, "keep": keep}
        tiling = Tiling(self.num_entries, self.num_columns)
        super().__init__(rule, items, tiling, Sketch.of(table), inserted, **scalars)


class Query(Argument):
    """A query of a sketch, of rows or of elements."""

    _fields_ = (
        ("items", Items),
        ("tiling", Tiling),
        ("sketch", Sketch),
        ("estimates", c_void_p),
    )


class DeviceStep(Structure):
    """A step of one parameter (n, m): its state, and after `take` what has arrived for it.

    kind: of the second moment. num_items, dim: k and m. is_whole: all rows, or elements, arrived.
    is_aligned: parameter and state lie on boundaries of as many elements as a thread takes at once;
    boundary: that of a gradient, in bytes.
    """

    _fields_ = (
        ("rule", Rule),
        ("items", Items),
        ("tiling", Tiling),
        ("first", c_int),
        ("second", c_int),
        ("first_values", c_void_p),
        ("second_values", c_void_p),
        ("first_sketch", Sketch),
        ("second_sketch", Sketch),
        *((name, c_void_p) for name in ("row", "col", "row_max", "col_max", "averages")),
        *((name, c_void_p) for name in ("row_sums", "col_sums", "mean", "changes")),
        *((name, c_void_p) for name in ("keys", "sorted", "order")),
        *((name, c_int64) for name in ("first_key", "first_item")),
        ("is_wrong", c_void_p),
    )

    def __init__(self, param: Tensor, first: First, second: Second) -> None:
        super().__init__(first=FirstKind.of(first), second=SecondKind.of(second))
        self.kind, self.dtype = SecondKind.of(second), _TYPES[param.dtype]
        self.num_rows, self.dim = param.shape
        self.items = Items(0, self.num_rows, self.dim)
        self.items.param = param.data_ptr()
        self.is_sketched = isinstance(first, Table) or isinstance(second, Table)
        self.boundary = COLUMNS * param.element_size()
        self._set_state(first, second)
        state = (self.first_values, self.second_values, self.col)
        of_state = any((at or 0) % (COLUMNS * 4) for at in state)
        self.is_aligned = not of_state and param.data_ptr() % self.boundary == 0
        self._shape: tuple[int, bool, bool] | None = None

    def _set_state(self, first: First, second: Second) -> None:
        match first:
            case Full() | MomentOfUpdates():
                self.first_values = first.values.data_ptr()
            case Table():
                self.first_sketch = Sketch.of(first)
        match second:
            case Full():
                self.second_values = second.values.data_ptr()
            case Cover() | Factored():
                self.row, self.col = second.row.data_ptr(), second.col.data_ptr()
            case Table():
                self.second_sketch = Sketch.of(second)

    def take(
        self,
        rule: Rule,
        grad: Tensor,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        """Set what has arrived: a dense gradient, rows of it, or values of elements."""
        self.rule = rule
        items, at = self.items, grad.data_ptr()
        positions = indices if rows is None else rows
        items.grad = at
        items.positions = None if positions is None else positions.data_ptr()
        items.is_aligned = self.is_aligned and at % self.boundary == 0
        shape = (self.num_rows if positions is None else grad.shape[0], positions is None,
                 indices is not None)  # fmt: skip
        if shape != self._shape:
            self._shape = shape
            self._lay_out(*shape)

    def _lay_out(self, num_items: int, is_dense: bool, is_elements: bool) -> None:
        self.num_items, self.is_dense, self.is_elements = num_items, is_dense, is_elements
        self.items.num_items, self.items.is_dense = num_items, is_dense
        self.items.is_elements = is_elements
        self.is_whole = num_items == self.num_rows * (self.dim if is_elements else 1)
        self.is_flat = is_dense and not self.is_sketched and self.kind <= SecondKind.FULL
        if self.is_flat:
            self.tiling = Tiling.flat(num_items * self.dim)
        elif not is_elements:
            self.tiling = Tiling(num_items, self.dim, is_packed=self.dim % COLUMNS == 0)
