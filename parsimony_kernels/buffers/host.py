"""The pass over buffers for CPU tensors, by host.cpp. ops.py has checked the arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.arguments import Putting, accumulation, make_room
from parsimony_kernels.buffers.operands import Blocks, Buffer, Found, Pass
from parsimony_kernels.runtime.build import host_library

PARALLEL_FROM = 1 << 15  # elements; below, starting threads costs more than it saves


def accumulate(given: Pass) -> Found:
    work = accumulation(given)
    work.threads = torch.get_num_threads() if work.numel >= PARALLEL_FROM else 1
    if given.selection is not None:
        make_room(work, given, num_lists=work.threads)
    listed = (ctypes.c_int64 * work.threads)()
    host_library().parsimony_accumulate(ctypes.byref(work), listed)
    if given.selection is None:
        nothing = torch.zeros(0, dtype=torch.int64, device=work.kept["report"].device)
        return Found(work.kept["report"], nothing, nothing.float(), None)
    lists = (work.kept.get(name) for name in ("indices", "values", "velocities"))
    return Found(work.kept["report"], *(_join(each, work.capacity, listed) for each in lists))


def put(buffer: Buffer, indices_K: Tensor, values_K: Tensor | None, key: int) -> None:
    numel = (buffer.codes if isinstance(buffer, Blocks) else buffer).numel()
    low, high = map(int, torch.aminmax(indices_K))
    if low < 0 or high >= numel:
        raise IndexError(f"indices lie in {low}..{high}; allowed: 0..{numel - 1}")
    host_library().parsimony_put(ctypes.byref(Putting(buffer, indices_K, values_K, key)))


def _join(lists: Tensor | None, capacity: int, listed: Sequence[int]) -> Tensor | None:
    """Return what the threads have listed, one after another; each has room for `capacity`."""
    if lists is None:
        return None
    return torch.cat([lists[i * capacity : i * capacity + count] for i, count in enumerate(listed)])
