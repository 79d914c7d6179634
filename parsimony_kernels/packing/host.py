"""The operations for CPU tensors, by host.cpp and merge.cpp. ops.py has checked the arguments."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.packing.message import Sections
from parsimony_kernels.runtime.build import host_library

_pointer, _i64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class EntryList(ctypes.Structure):
    _fields_ = [("positions", _pointer), ("values", _pointer), ("length", _i64)]


def round_values(values_M: Tensor, coding: int) -> Tensor:
    rounded = torch.empty_like(values_M)
    _library().parsimony_round_values(
        _at(values_M), _i64(values_M.numel()), _int(coding), _at(rounded)
    )
    return rounded


def pack(words: Tensor, parts: Sections, positions_K: Tensor, values_M: Tensor) -> int:
    return _library().parsimony_pack(
        ctypes.byref(parts), _at(positions_K), _at(values_M), _at(words)
    )


def unpack(words: Tensor, parts: Sections) -> tuple[Tensor, Tensor, int]:
    positions_K = torch.empty(parts.num_entries, dtype=torch.int64, device="cpu")
    values_M = torch.empty(parts.num_values, dtype=torch.float32, device="cpu")
    problems = _library().parsimony_unpack(
        ctypes.byref(parts), _at(words), _at(positions_K), _at(values_M)
    )
    return positions_K, values_M, problems


def merge(positions: Sequence[Tensor], values: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    pairs = zip(positions, values, strict=True)
    lists = (EntryList * len(positions))(
        *((p.data_ptr(), v.data_ptr(), p.numel()) for p, v in pairs)
    )
    what = lists, _i64(len(lists))
    room = torch.empty(sum(p.numel() for p in positions), dtype=torch.int64, device="cpu")
    count = _checked(_library().parsimony_unite(*what, _at(room)))
    positions_U = room[:count].clone()  # not a view of what may be as long as all lists together
    sums = torch.zeros(count * dim, dtype=torch.float32, device="cpu")
    sizes = _i64(count), _i64(dim)
    _checked(_library().parsimony_add_up(*what, _at(positions_U), *sizes, _at(sums)))
    return positions_U, sums


def _checked(result: int) -> int:
    if result == -1:
        raise ValueError("positions of a list that are negative or do not ascend")
    if result == -2:
        raise MemoryError("too little memory to merge entries")
    return result


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return _pointer(tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL:
    library = host_library()
    for name in ("unite", "add_up"):
        getattr(library, f"parsimony_{name}").restype = _i64
    return library
