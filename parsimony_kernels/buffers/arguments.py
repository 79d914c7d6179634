"""Passes over buffers as the kernels are given them, on the host and the device alike: see abi.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Array, Structure, c_float, c_int, c_int64, c_uint32, c_void_p
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
    Selection,
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


class Putting(Structure):
    _fields_ = (("buffer", Stored), *((name, c_int64) for name in ("end", "first", "key")))


class Puttings(Argument):
    _fields_ = (
        ("puttings", c_void_p),
        ("count", c_int64),
        *((name, c_void_p) for name in ("positions", "values")),
    )


def puttings(puts: Sequence[Put]) -> Array[Putting]:
    """Return what says where the values of some positions are written."""
    ends = accumulate(put.count for put in puts)
    return (Putting * len(puts))(*(
        Putting(Stored(put.buffer), end, put.first, put.key)
        for put, end in zip(puts, ends, strict=True)
    ))  # fmt: skip


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

    def __init__(self, given: Pass) -> None:
        """Take what a pass is given; it takes nothing out yet."""
        stored = map(Stored, (
            given.grad_N, given.residual, given.old_residual, given.velocity, given.old_velocity
        ))  # fmt: skip
        scale = None if given.scale is None else given.scale.data_ptr()
        super().__init__(
            *stored, given.numel, given.key, given.key ^ VELOCITY_KEY, scale, threads=1,
            correction=given.correction, lagged=given.lagged, lags=given.lags, first=given.first,
        )  # fmt: skip

    def select(self, selection: Selection) -> None:
        self.capacity, self.threshold = min(selection.capacity, self.numel), selection.limit
        self.sample_every, self.sample_first = selection.sample_every, selection.sample_first


class Together:
    """The arguments of several passes on one device, and the memory of what they find.

    works: of the passes. report: of all of them, one after another.
    """

    def __init__(self, passes: Sequence[Pass], num_threads: Callable[[int], int]) -> None:
        """num_threads: of a tensor of so many elements, each of which lists in room of its own."""
        self.works, self._passes = [Accumulation(each) for each in passes], passes
        self._device = passes[0].device
        self._rooms = []
        for work, each in zip(self.works, passes, strict=True):
            work.threads = num_threads(work.numel)
            if each.selection is not None:
                work.select(each.selection)
            self._rooms.append(work.threads * work.capacity)
        sizes = [2 if each.selection is None else 2 + BINS for each in passes]
        self.report = torch.zeros(sum(sizes), dtype=torch.int32, device=self._device)
        self._reports = self.report.split(sizes)
        self._give_room()

    def _give_room(self) -> None:
        """Let passes that select list entries. Most of that is never touched on a CPU, and so takes
        no memory there."""
        has_velocities = any(each.lists_velocities for each in self._passes)
        self._lists = {
            "indices": self._room(torch.int64),
            "values": self._room(torch.float32),
            "velocities": self._room(torch.float32) if has_velocities else None,
        }
        for number, (work, each) in enumerate(zip(self.works, self._passes, strict=True)):
            work.report = self._reports[number].data_ptr()
            if each.selection is not None:
                work.indices = self._lists["indices"][number].data_ptr()
                work.values = self._lists["values"][number].data_ptr()
            if each.lists_velocities:
                work.velocities = self._lists["velocities"][number].data_ptr()

    def _room(self, dtype: torch.dtype) -> Sequence[Tensor]:
        return torch.empty(sum(self._rooms), dtype=dtype, device=self._device).split(self._rooms)

    def founds(
        self, entries: Callable[[Tensor, int], Tensor], *, is_sorted: bool
    ) -> list[Found]:
        """Return what each pass has found.

        entries: a list, the number of its tensor -> what of the list is kept.
        """
        found = []
        for number, each in enumerate(self._passes):
            velocities = self._lists["velocities"] if each.lists_velocities else None
            found.append(Found(
                self._reports[number], entries(self._lists["indices"][number], number),
                entries(self._lists["values"][number], number),
                None if velocities is None else entries(velocities[number], number),
                is_sorted=is_sorted,
            ))  # fmt: skip
        return found
