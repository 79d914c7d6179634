"""The passes of buffers.py for CPU tensors, by host_buffers.cpp. Arguments were checked there."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.runtime.build import host_library
from parsimony_kernels.runtime.operands import (
    BINS,
    PARAMETER_DTYPES,
    STORED_DTYPES,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Correction,
    Found,
    Selection,
)

PARALLEL_FROM = 1 << 15  # elements; below, starting threads costs more than it saves
_CPU = torch.device("cpu")  # said by name, it would be parsed in each call
_pointer, _i64, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _BufferArgs(ctypes.Structure):
    _fields_ = [("values", _pointer), ("scales", _pointer), ("kind", _i64)]


class _AccumulateArgs(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("grad", "scale")),
        *((name, _BufferArgs) for name in ("residual", "old_residual", "velocity", "old_velocity")),
        *((name, _i64) for name in ("n", "residual_key", "velocity_key")),
        *((name, _pointer) for name in ("report", "indices", "values", "velocities")),
        ("capacity", _i64),
        *((name, _int) for name in ("sample_every", "sample_first", "dtype", "threads")),
        ("threshold", _float),
        ("correction", Correction),
    ]


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
    n = (residual.codes if isinstance(residual, Blocks) else residual).numel()
    args = _AccumulateArgs(
        grad=None if grad_N is None else grad_N.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        residual=_buffer_args(residual), old_residual=_buffer_args(old_residual),
        velocity=_buffer_args(velocity), old_velocity=_buffer_args(old_velocity),
        n=n, residual_key=key, velocity_key=key ^ VELOCITY_KEY,
        dtype=0 if grad_N is None else PARAMETER_DTYPES.index(grad_N.dtype),
        threads=torch.get_num_threads() if n >= PARALLEL_FROM else 1,
        correction=correction,
    )  # fmt: skip
    room = 0 if selection is None else min(selection.capacity, n)
    places = args.threads * room  # most of them are never touched, and so take no memory
    indices = torch.empty(places, dtype=torch.int64, device=_CPU)
    values = torch.empty(places, dtype=torch.float32, device=_CPU)
    size = 2 if selection is None else 2 + BINS
    report = torch.zeros(size, dtype=torch.int32, device=_CPU)
    args.report, velocities = report.data_ptr(), None
    if selection is not None:
        args.indices, args.values, args.capacity = indices.data_ptr(), values.data_ptr(), room
        args.sample_every, args.sample_first = selection.sample_every, selection.sample_first
        args.threshold = selection.limit
        if velocity is not None and selection.mask_velocity:
            velocities = torch.empty_like(values)
            args.velocities = velocities.data_ptr()
    listed = (_i64 * args.threads)()
    _library().parsimony_accumulate(ctypes.byref(args), listed)
    joined = (_join(places, room, listed) for places in (indices, values, velocities))
    return Found(report, *joined)


def _join(places: Tensor | None, room: int, listed: Sequence[int]) -> Tensor | None:
    """Return what each thread has written at the begin of its places, in their order."""
    if places is None:
        return None
    return torch.cat([places[i * room : i * room + count] for i, count in enumerate(listed)])


@functools.cache
def _library() -> ctypes.CDLL:
    library = host_library()
    library.parsimony_accumulate.restype = None
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
