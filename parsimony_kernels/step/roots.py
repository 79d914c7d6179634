"""Roots of many tensors' second moments at elements, as the kernels are given them: see abi.h."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, Structure, c_float, c_int, c_int64, c_void_p
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from parsimony_kernels.runtime.launch import Argument
from parsimony_kernels.runtime.operands import Cover, Factored, Full, SecondKind


class Root(NamedTuple):
    """sqrt(second moment + inside) * scale + outside, at the next `count` of some positions, which
    are `first` more than the tensor's own elements."""

    second: Full | Cover | Factored
    count: int
    first: int
    inside: float
    scale: float
    outside: float

    @property
    def tensor(self) -> Tensor:
        return self.second.values if isinstance(self.second, Full) else self.second.row


class Rooting(Structure):
    _fields_ = (
        ("kind", c_int),
        *((name, c_void_p) for name in ("values", "row", "col", "mean")),
        *((name, c_int64) for name in ("dim", "end", "first")),
        *((name, c_float) for name in ("inside", "scale", "outside")),
    )


class Rootings(Argument):
    _fields_ = (
        ("rootings", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("positions", "roots")),
    )


def rootings(asked: Sequence[Root], means: int = 0) -> Array[Rooting]:
    """Return what is asked as an array. means: where there is memory for each tensor's mean."""
    found = (Rooting * len(asked))()
    ends = accumulate(root.count for root in asked)
    for number, (into, root, end) in enumerate(zip(found, asked, ends, strict=True)):
        second = root.second
        into.end, into.first = end, root.first
        into.inside, into.scale, into.outside = root.inside, root.scale, root.outside
        if isinstance(second, Full):
            into.kind, into.values = SecondKind.FULL, second.values.data_ptr()
            continue
        is_factored = isinstance(second, Factored)
        into.kind = SecondKind.FACTORED if is_factored else SecondKind.COVER
        into.row, into.col, into.dim = second.row.data_ptr(), second.col.data_ptr(), len(second.col)
        into.mean = means + 4 * number if is_factored else None
    return found
