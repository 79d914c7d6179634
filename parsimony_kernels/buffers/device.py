"""The passes of buffers.py in CUDA, by device_buffers.cu. Arguments were checked there.

Work goes to torch's current stream of the tensors' device, and nothing here waits for it. There
are no temporaries but the lists, of a selection's capacity, and the report.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import THREADS
from parsimony_kernels.runtime.operands import (
    BINS,
    BLOCK,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Correction,
    Found,
    Selection,
)
from parsimony_kernels.step import device

# Enough to fill a GPU; few, because each of their warps ends in an atomic on one number.
MAX_BLOCKS = 4096
_LANES = 32
_STORAGES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # device_buffers.cu's Storage
_IN_BLOCKS = 4


class _Stored(Structure):
    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("storage", c_int))

    def __init__(self, buffer: Buffer | None) -> None:
        if isinstance(buffer, Blocks):
            super().__init__(buffer.codes.data_ptr(), buffer.scales.data_ptr(), _IN_BLOCKS)
        elif buffer is not None:
            super().__init__(buffer.data_ptr(), None, _STORAGES[buffer.dtype])


class Accumulation(device.Argument):
    _fields_ = (
        *((name, _Stored) for name in ("grad", "residual", "old_residual")),
        *((name, _Stored) for name in ("velocity", "old_velocity")),
        *((name, c_int64) for name in ("numel", "residual_key", "velocity_key")),
        *((name, c_void_p) for name in ("scale", "report", "indices", "values", "velocities")),
        ("capacity", c_int64),
        *((name, c_uint32) for name in ("sample_every", "sample_first")),
        ("threshold", c_float),
        ("correction", Correction),
    )


def accumulate(
    grad_N: Tensor | None,
    correction: Correction,
    residual: Buffer,
    old_residual: Buffer | None,
    velocity: Buffer | None,
    old_velocity: Buffer | None,
    scale: Tensor | None,
    key: int,
    selection: Selection | None = None,
) -> Found:
    values = residual.codes if isinstance(residual, Blocks) else residual
    stored = map(_Stored, (grad_N, residual, old_residual, velocity, old_velocity))
    work = Accumulation(*stored, values.numel(), key, key ^ VELOCITY_KEY, correction=correction)
    if scale is not None:
        work.point(scale=scale)
    size = 2 if selection is None else 2 + BINS
    work.point(report=torch.zeros(size, dtype=torch.int32, device=values.device))
    kernel = "accumulate"
    if selection is not None:
        _make_room(work, selection, velocity, values.device)
        kernel = "select_stored" if grad_N is None else "accumulate_select"
    _launch(kernel, work, values.device)
    nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
    return Found(
        work.kept["report"],
        work.kept.get("indices", nothing),
        work.kept.get("values", nothing.to(torch.float32)),
        work.kept.get("velocities"),
        is_sorted=False,
    )


def _make_room(
    work: Accumulation, selection: Selection, velocity: Buffer | None, where: torch.device
) -> None:
    """Let a pass select: hand over the settings, and where to list."""
    room = min(selection.capacity, work.numel)
    work.capacity, work.threshold = room, selection.limit
    work.sample_every, work.sample_first = selection.sample_every, selection.sample_first
    work.point(
        indices=torch.empty(room, dtype=torch.int64, device=where),
        values=torch.empty(room, dtype=torch.float32, device=where),
    )
    if velocity is not None and selection.mask_velocity:
        work.point(velocities=torch.empty(room, dtype=torch.float32, device=where))


def _launch(name: str, work: Accumulation, where: torch.device) -> None:
    """Launch a warp for each block of the buffer."""
    blocks = -(-work.numel // (THREADS // _LANES * BLOCK))
    device.launcher.launch(name, min(blocks, MAX_BLOCKS), work, where)
