"""The passes over buffers for CPU tensors, by host.cpp. ops.py has checked the arguments."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.arguments import Accumulation, Puttings, Together, puttings
from parsimony_kernels.buffers.operands import Found, Pass, Put, tensors
from parsimony_kernels.runtime.build import host_library

PARALLEL_FROM = 1 << 15  # elements; below, starting threads costs more than it saves


def accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    threads = torch.get_num_threads()
    together = Together(passes, lambda numel: threads if numel >= PARALLEL_FROM else 1)
    works = (Accumulation * len(passes))(*together.works)
    ends = list(itertools.accumulate((work.threads for work in works), initial=0))
    listed = (ctypes.c_int64 * ends[-1])()
    num_small = sum(work.numel for work in works if work.threads == 1)
    host_library().parsimony_accumulate(
        ctypes.byref(works), ctypes.c_int64(len(passes)),
        threads if num_small >= PARALLEL_FROM else 1, ctypes.byref(listed),
    )  # fmt: skip

    def entries(lists: Tensor, number: int) -> Tensor:
        """Return what the threads have listed, one after another; each has room for `capacity`."""
        each = works[number].capacity
        counts = listed[ends[number] : ends[number + 1]]
        return torch.cat([lists[i * each : i * each + count] for i, count in enumerate(counts)])

    return together.founds(entries, is_sorted=True), together.report


def put(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    where = puttings(puts)
    numels = [tensors(each.buffer)[0].numel() for each in puts]
    values = None if values_K is None else values_K.data_ptr()
    argument = Puttings(ctypes.addressof(where), len(puts), positions_K.data_ptr(), values)
    wrong = host_library().parsimony_put(
        ctypes.byref(argument), (ctypes.c_int64 * len(puts))(*numels)
    )
    if wrong >= 0:
        start = sum(each.count for each in puts[:wrong])
        indices = positions_K[start : start + puts[wrong].count] - puts[wrong].first
        low, high = map(int, torch.aminmax(indices))
        raise IndexError(f"indices lie in {low}..{high}; allowed: 0..{numels[wrong] - 1}")
