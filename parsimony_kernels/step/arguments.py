"""What the kernels of a step are given, on the host and on the device: see abi.h."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from enum import IntEnum

from parsimony_kernels.runtime.launch import COLUMNS, THREADS, Argument
from parsimony_kernels.runtime.operands import Rule, Sketch

# A tile's threads take up to MAX_ROWS_PER_THREAD rows each, so that blocks seldom write maxima and
# sums. They take fewer rows if there would be less than WANTED_TILES tiles, too few to fill a GPU.
MAX_ROWS_PER_THREAD = 16
WANTED_TILES = 512


class HostStep(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("param", "grad", "at")),
        *((name, c_int64) for name in ("n", "m", "k")),
        *((name, c_int) for name in ("storage", "first", "second", "threads")),
        *((name, c_void_p) for name in ("first_values", "second_values", "row", "col")),
        *((name, Sketch) for name in ("first_sketch", "second_sketch")),
        ("rule", Rule),
        ("num_steps", c_void_p),
    ]


class Tiling(Structure):
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


class Items(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_items", "num_rows", "dim")),
        *((name, c_void_p) for name in ("positions", "param", "grad", "scale")),
        *((name, c_int) for name in ("is_elements", "is_dense")),
    )


class Inserted(IntEnum):
    """What is inserted into a sketch: values as they are, the gradient, or its square."""

    VALUES = 0
    GRADIENT = 1
    SQUARE = 2


class Feeding(Argument):
    _fields_ = (
        ("rule", Rule),
        ("items", Items),
        ("tiling", Tiling),
        ("sketch", Sketch),
        ("inserted", c_int),
        *((name, c_float) for name in ("gain", "forgetting", "keep")),
        *((name, c_void_p) for name in ("cells", "order", "ranks", "fresh", "estimates")),
    )


class DeviceStep(Argument):
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
        *((name, c_void_p) for name in ("keys", "order", "means")),
        ("num_averaged", c_int64),
    )
