"""A pass over buffers as the kernels are given it, on the host and the device alike: see abi.h."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import (
    BINS,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Correction,
    Pass,
)
from parsimony_kernels.runtime.launch import Argument
from parsimony_kernels.runtime.operands import Storage


class Stored(Structure):
    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("storage", c_int64))

    def __init__(self, buffer: Buffer | None) -> None:
        if isinstance(buffer, Blocks):
            super().__init__(buffer.codes.data_ptr(), buffer.scales.data_ptr(), Storage.BLOCKS)
        elif buffer is not None:
            super().__init__(buffer.data_ptr(), None, Storage.of(buffer.dtype))


class Putting(Argument):
    _fields_ = (
        ("buffer", Stored),
        *((name, c_void_p) for name in ("indices", "values")),
        *((name, c_int64) for name in ("count", "key")),
    )

    def __init__(
        self, buffer: Buffer, indices_K: Tensor, values_K: Tensor | None, key: int
    ) -> None:
        values = None if values_K is None else values_K.data_ptr()
        super().__init__(Stored(buffer), indices_K.data_ptr(), values, len(indices_K), key)


class Accumulation(Argument):
    _fields_ = (
        *((name, Stored) for name in ("grad", "residual", "old_residual")),
        *((name, Stored) for name in ("velocity", "old_velocity")),
        *((name, c_int64) for name in ("numel", "residual_key", "velocity_key")),
        *((name, c_void_p) for name in ("scale", "report", "indices", "values", "velocities")),
        ("capacity", c_int64),
        *((name, c_uint32) for name in ("sample_every", "sample_first")),
        ("threshold", c_float),
        ("correction", Correction),
        *((name, c_int) for name in ("threads", "lagged", "lags")),
    )


def accumulation(given: Pass) -> Accumulation:
    """Return the argument of a pass that takes nothing out yet: see `make_room`."""
    residual, key = given.residual, given.key
    values = residual.codes if isinstance(residual, Blocks) else residual
    stored = map(Stored, (
        given.grad_N, residual, given.old_residual, given.velocity, given.old_velocity
    ))  # fmt: skip
    work = Accumulation(
        *stored, values.numel(), key, key ^ VELOCITY_KEY, correction=given.correction,
        lagged=given.lagged, lags=given.lags,
    )  # fmt: skip
    if given.scale is not None:
        work.point(scale=given.scale)
    size = 2 if given.selection is None else 2 + BINS
    work.point(report=torch.zeros(size, dtype=torch.int32, device=values.device))
    return work


def make_room(work: Accumulation, given: Pass, *, num_lists: int) -> None:
    """Let a pass select: hand over the settings, and the memory for its lists of entries.

    Most of that is never touched on a CPU, and so takes no memory there.
    """
    selection = given.selection
    device, work.capacity = work.kept["report"].device, min(selection.capacity, work.numel)
    work.threshold = selection.limit
    work.sample_every, work.sample_first = selection.sample_every, selection.sample_first
    length = num_lists * work.capacity
    work.point(
        indices=torch.empty(length, dtype=torch.int64, device=device),
        values=torch.empty(length, dtype=torch.float32, device=device),
    )
    if given.lists_velocities:
        work.point(velocities=torch.empty(length, dtype=torch.float32, device=device))
