"""The passes of buffers.py for CPU tensors, by host_buffers.cpp. Arguments were checked there."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kernels.build import host_library
from kernels.operands import (
    BLOCK,
    PARAMETER_DTYPES,
    STORED_DTYPES,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Correction,
)

_pointer, _i64, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _BufferArgs(ctypes.Structure):
    _fields_ = [("values", _pointer), ("scales", _pointer), ("kind", _i64)]


class _AccumulateArgs(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("grad", "scale")),
        *((name, _BufferArgs) for name in ("residual", "old_residual", "velocity", "old_velocity")),
        *((name, _i64) for name in ("n", "residual_key", "velocity_key")),
        *((name, _int) for name in ("dtype", "threads")),
        ("correction", Correction),
    ]


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
    args = _AccumulateArgs(
        grad=grad_N.data_ptr(), scale=None if scale is None else scale.data_ptr(),
        residual=_buffer_args(residual), old_residual=_buffer_args(old_residual),
        velocity=_buffer_args(velocity), old_velocity=_buffer_args(old_velocity),
        n=grad_N.numel(), residual_key=key, velocity_key=key ^ VELOCITY_KEY,
        dtype=PARAMETER_DTYPES.index(grad_N.dtype), threads=torch.get_num_threads(),
        correction=correction,
    )  # fmt: skip
    largest = _library().parsimony_accumulate(ctypes.byref(args))
    return torch.tensor([largest], dtype=torch.float32)


def select_above(buffer: Buffer, threshold: float) -> Tensor:
    args = _buffer_args(buffer)
    n = (buffer.codes if isinstance(buffer, Blocks) else buffer).numel()
    starts = torch.empty(-(-n // BLOCK) + 1, dtype=torch.int64)
    what = ctypes.byref(args), _i64(n), _float(threshold), _pointer(starts.data_ptr())
    threads = _int(torch.get_num_threads())
    _library().parsimony_count_above(*what, threads)
    indices = torch.empty(int(starts[-1]), dtype=torch.int64)
    _library().parsimony_list_above(*what, _pointer(indices.data_ptr()), threads)
    return indices


@functools.cache
def _library() -> ctypes.CDLL:
    library = host_library()
    library.parsimony_accumulate.restype = _float
    library.parsimony_buffer_sizes.restype = _i64
    for which, ours in enumerate((_AccumulateArgs, _BufferArgs)):
        assert library.parsimony_buffer_sizes(which) == ctypes.sizeof(ours)
    return library


def _buffer_args(buffer: Buffer | None) -> _BufferArgs:
    """Describe a buffer by where it lies and its kind: host_buffers.cpp has the same numbers."""
    if buffer is None:
        return _BufferArgs()
    if isinstance(buffer, Blocks):
        return _BufferArgs(buffer.codes.data_ptr(), buffer.scales.data_ptr(), 3)
    return _BufferArgs(buffer.data_ptr(), None, 1 + STORED_DTYPES.index(buffer.dtype))
