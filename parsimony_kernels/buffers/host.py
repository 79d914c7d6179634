"""The passes over buffers for CPU tensors, by host.cpp. ops.py has checked the arguments."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from parsimony_kernels.buffers.arguments import Puttings, Room, puttings
from parsimony_kernels.buffers.operands import Found, Pass, Put, tensors
from parsimony_kernels.runtime.build import host_library

PARALLEL_FROM = 1 << 15  # elements; below, starting threads costs more than it saves


def threads_of(passes: Sequence[Pass]) -> list[int]:
    """Return how many threads make each pass; small ones each have one, side by side."""
    most = torch.get_num_threads()
    return [most if given.numel >= PARALLEL_FROM else 1 for given in passes]


def accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    room = Room.of(passes, threads_of(passes))
    num_small = sum(given.numel for given in passes if given.numel < PARALLEL_FROM)
    counts = (c_int64 * len(passes))()
    lists = (room.indices, room.values, room.velocities)
    host_library().parsimony_accumulate(
        b"".join(room.pack(passes)), c_int64(len(passes)),
        torch.get_num_threads() if num_small >= PARALLEL_FROM else 1,
        *(c_void_p(0 if each is None else each.data_ptr()) for each in lists), counts,
    )  # fmt: skip
    return room.compacted(sum(counts)).found(passes, counts, is_sorted=True), room.report


def put(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    where = array("B", puttings(puts))
    numels = [tensors(each.buffer)[0].numel() for each in puts]
    values = None if values_K is None else values_K.data_ptr()
    argument = Puttings(where.buffer_info()[0], len(puts), positions_K.data_ptr(), values)
    wrong = host_library().parsimony_put(byref(argument), (c_int64 * len(puts))(*numels))
    if wrong >= 0:
        start = sum(each.count for each in puts[:wrong])
        indices = positions_K[start : start + puts[wrong].count] - puts[wrong].first
        low, high = map(int, torch.aminmax(indices))
        raise IndexError(f"indices lie in {low}..{high}; allowed: 0..{numels[wrong] - 1}")
