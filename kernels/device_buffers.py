"""The passes of buffers.py in CUDA, by device_buffers.cu. Arguments were checked there.

Work goes to torch's current stream of the tensors' device. `accumulate` does not wait for it and
has no temporaries; `select_above` waits once, for the count, and has 12 bytes for each 256
elements.
"""

from __future__ import annotations

from ctypes import Structure, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import device
from kernels.launch_cupy import THREADS
from kernels.operands import BLOCK, VELOCITY_KEY, Blocks, Buffer, Correction

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
        ("scale", c_void_p),
        ("largest", c_void_p),
        ("correction", Correction),
    )


class Selection(device.Argument):
    _fields_ = (
        ("buffer", _Stored),
        ("numel", c_int64),
        *((name, c_void_p) for name in ("counts", "ends", "indices")),
        ("threshold", c_float),
    )


def accumulate(
    grad_N: Tensor,
    correction: Correction,
    residual: Buffer,
    old_residual: Buffer | None,
    velocity: Buffer | None,
    old_velocity: Buffer | None,
    scale: Tensor | None,
    key: int,
) -> Tensor:
    buffers = (grad_N, residual, old_residual, velocity, old_velocity)
    work = Accumulation(*map(_Stored, buffers), grad_N.numel(), key, key ^ VELOCITY_KEY)
    work.correction = correction
    if scale is not None:
        work.point(scale=scale)
    largest = torch.zeros(1, device=grad_N.device)
    work.point(largest=largest)
    _launch("accumulate", work, grad_N.device)
    return largest


def select_above(buffer: Buffer, threshold: float) -> Tensor:
    values = buffer.codes if isinstance(buffer, Blocks) else buffer
    work = Selection(_Stored(buffer), values.numel(), threshold=threshold)
    counts = values.new_empty(-(-values.numel() // BLOCK), dtype=torch.int32)
    work.point(counts=counts)
    _launch("select_count", work, values.device)
    ends = counts.cumsum(0)
    indices = values.new_empty(int(ends[-1]), dtype=torch.int64)
    if len(indices) > 0:
        work.point(ends=ends, indices=indices)
        _launch("select_write", work, values.device)
    return indices


def _launch(name: str, work: Accumulation | Selection, where: torch.device) -> None:
    """Launch a warp for each block of the buffer."""
    blocks = -(-work.numel // (THREADS // _LANES * BLOCK))
    device.launcher.launch(name, min(blocks, MAX_BLOCKS), work, where)
