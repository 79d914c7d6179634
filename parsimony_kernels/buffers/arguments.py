"""Passes over buffers as the kernels are given them, on the host and the device alike: see abi.h.

A structure is packed by `struct`, which takes a tenth of the time that ctypes does; there are a
hundred in a step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_uint32, c_void_p, sizeof
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import (
    BINS,
    VELOCITY_KEY,
    Blocks,
    Buffer,
    Correction,
    Found,
    Pass,
    Put,
)
from parsimony_kernels.runtime.launch import Argument
from parsimony_kernels.runtime.operands import PARAMETER_DTYPES, Storage


class Stored(Structure):
    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("storage", c_int64))


class Putting(Structure):
    _fields_ = (("buffer", Stored), *((name, c_int64) for name in ("end", "first", "key")))


class Puttings(Argument):
    _fields_ = (
        ("puttings", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("positions", "values")),
    )


class Accumulation(Structure):
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
        ("first", c_int64),
    )


_CODES = {c_void_p: "Q", c_int64: "Q", c_uint32: "I", c_float: "f", c_int: "i"}
_KEY = (1 << 64) - 1  # 64 bits of any sign


def packer(structure: type[Structure]) -> struct.Struct:
    """Return what packs the fields of a structure. Those that are structures are given packed."""
    codes = (_CODES.get(kind) or f"{sizeof(kind)}s" for _, kind, *_ in structure._fields_)
    return struct.Struct("@" + "".join(codes) + "0Q")  # up to the boundary where another can lie


_pack_stored, _pack_accumulation, _pack_putting = (
    packer(structure).pack for structure in (Stored, Accumulation, Putting)
)
_ABSENT = _pack_stored(0, 0, Storage.ABSENT)
_STORAGE = {dtype: int(Storage.of(dtype)) for dtype in PARAMETER_DTYPES}


def stored(buffer: Buffer | None) -> bytes:
    """Return a Stored, packed."""
    if buffer is None:
        return _ABSENT
    if isinstance(buffer, Blocks):
        return _pack_stored(buffer.codes.data_ptr(), buffer.scales.data_ptr(), Storage.BLOCKS)
    return _pack_stored(buffer.data_ptr(), 0, _STORAGE[buffer.dtype])


# ---- passes --------------------------------------------------------------------------------------


@dataclass
class Room:
    """The memory that passes fill: reports, zeroed and joined end to end, and lists of entries.

    threads: of each pass; lengths: of its lists, with room for `capacity` for each thread.
    velocities: None if no pass lists any.
    """

    report: Tensor
    indices: Tensor
    values: Tensor
    velocities: Tensor | None
    sizes: list[int]
    threads: Sequence[int]
    lengths: list[int]

    @classmethod
    def of(cls, passes: Sequence[Pass], threads: Sequence[int]) -> Room:
        """Return room for passes. Most of the lists' is never touched on a CPU, and so takes no
        memory there."""
        device = passes[0].device
        sizes = [2 if given.selection is None else 2 + BINS for given in passes]
        lengths = [_capacity(given) * num for given, num in zip(passes, threads, strict=True)]
        lists, length = any(given.lists_velocities for given in passes), sum(lengths)
        return cls(
            torch.zeros(sum(sizes), dtype=torch.int32, device=device),
            torch.empty(length, dtype=torch.int64, device=device),
            torch.empty(length, dtype=torch.float32, device=device),
            torch.empty(length, dtype=torch.float32, device=device) if lists else None,
            sizes, threads, lengths,
        )  # fmt: skip

    def pack(self, passes: Sequence[Pass]) -> list[bytes]:
        """Return an Accumulation for each pass."""
        report, indices, values = (x.data_ptr() for x in (self.report, self.indices, self.values))
        velocities = 0 if self.velocities is None else self.velocities.data_ptr()
        packed, length = [], 0
        for given, size, num, room in zip(
            passes, self.sizes, self.threads, self.lengths, strict=True
        ):
            at = values + 4 * length, velocities + 4 * length if given.lists_velocities else 0
            packed.append(_packed(given, num, (report, indices + 8 * length, *at)))
            report, length = report + 4 * size, length + room
        return packed

    def compacted(self, used: int) -> Room:
        """Return this with lists of just the entries, which lie side by side in the old ones."""
        lists = (self.indices, self.values, self.velocities)
        lists = (None if each is None else each[:used].clone() for each in lists)
        return Room(self.report, *lists, self.sizes, self.threads, self.lengths)

    def found(
        self, passes: Sequence[Pass], counts: Sequence[int], *, is_sorted: bool
    ) -> list[Found]:
        """Return what each pass has found, of whose lists so much is used."""
        reports, used = self.report.split(self.sizes), sum(counts)
        indices, values, velocities = (
            [None] * len(counts) if lists is None else lists[:used].split(list(counts))
            for lists in (self.indices, self.values, self.velocities)
        )
        return [
            Found(*of_pass, u if given.lists_velocities else None, is_sorted, given.first)
            for given, u, *of_pass in zip(passes, velocities, reports, indices, values, strict=True)
        ]


def _capacity(given: Pass) -> int:
    return 0 if given.selection is None else min(given.selection.capacity, given.numel)


def _packed(given: Pass, num_threads: int, pointers: tuple[int, int, int, int]) -> bytes:
    """Return an Accumulation. pointers: to the report, and the lists."""
    (grad_N, correction, residual, old_residual, velocity, old_velocity, scale, key, selection,
     lagged, lags, first) = given  # fmt: skip
    of_residual, of_velocity = stored(residual), stored(velocity)
    report, *lists = pointers
    settings = 1, 0, 0.0
    if selection is None:
        lists = 0, 0, 0
    else:
        limit = c_float(selection.limit).value
        settings = selection.sample_every, selection.sample_first, limit
    return _pack_accumulation(
        stored(grad_N), of_residual,
        of_residual if old_residual is residual else stored(old_residual),
        of_velocity,
        of_velocity if old_velocity is velocity else stored(old_velocity),
        given.numel, key & _KEY, (key ^ VELOCITY_KEY) & _KEY,
        0 if scale is None else scale.data_ptr(), report, *lists, _capacity(given),
        *settings, bytes(correction), num_threads, lagged, lags, first,
    )  # fmt: skip


# ---- puts ----------------------------------------------------------------------------------------


def puttings(puts: Sequence[Put]) -> bytes:
    """Return what says where the values of some positions are written: Puttings, packed."""
    ends = accumulate(put.count for put in puts)
    return b"".join(
        _pack_putting(stored(put.buffer), end, put.first, put.key & _KEY)
        for put, end in zip(puts, ends, strict=True)
    )
