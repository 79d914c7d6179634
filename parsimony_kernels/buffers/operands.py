"""What a worker keeps of a flattened tensor, and what a pass over it is given and returns.

abi.h has the same structures and constants.
Shapes: N elements of a flattened tensor, K selected of them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from parsimony_kernels.runtime.operands import state_dtype

BLOCK = 256  # elements that share a scale
LEVELS = 127  # codes lie within -127..127
MIN_SCALE = 1e-30  # of a block: no division by 0 where all its values are 0 or denormal
STORED_DTYPES = (torch.float32, torch.bfloat16)  # for a float64 tensor float64, not float32
VELOCITY_KEY = 1 << 40  # the velocity's key is the residual's with this bit changed


@dataclass(frozen=True)
class Blocks:
    """8 bits an element: codes (N,) int8, scales (ceil(N / 256),) float32; value = code * scale."""

    codes: Tensor
    scales: Tensor


Buffer = Tensor | Blocks
"""A flattened tensor as it is stored: in float32, float64, bfloat16 or 8-bit blocks."""


def tensors(buffer: Buffer) -> tuple[Tensor, ...]:
    """Return the tensors in which a buffer lives; ops.from_tensors makes it of them again."""
    return (buffer.codes, buffer.scales) if isinstance(buffer, Blocks) else (buffer,)


class Correction(ctypes.Structure):
    """Four float32 coefficients by which a gradient x joins velocity u and residual v:

    u <- u_beta u + u_gain x;  v <- v + (v_from_u u + v_gain x), with the new u.
    The defaults are those without velocity: v <- v + x. The values as given are kept for float64
    gradients: see `scalars`.
    """

    _fields_ = [(name, ctypes.c_float) for name in ("u_beta", "u_gain", "v_from_u", "v_gain")]

    def __init__(
        self,
        u_beta: float = 0.0,
        u_gain: float = 0.0,
        v_from_u: float = 0.0,
        v_gain: float = 1.0,
    ) -> None:
        super().__init__(u_beta, u_gain, v_from_u, v_gain)
        self._given = u_beta, u_gain, v_from_u, v_gain

    def scalars(self, dtype: torch.dtype) -> Sequence[float]:
        """Return (u_beta, u_gain, v_from_u, v_gain) for a gradient of this dtype."""
        if dtype == torch.float64:
            return self._given
        return self.u_beta, self.u_gain, self.v_from_u, self.v_gain


# ---- selecting -----------------------------------------------------------------------------------

BIN_SHIFT = 20  # of a magnitude's 31 bits: 8 bins an octave, each 7 to 12.5% wide
BINS = 1 << (31 - BIN_SHIFT)


@dataclass(frozen=True)
class Selection:
    """Which entries of a residual v a pass takes out: those with |v| >= threshold, but no zeros.

    threshold: 0 or more; inf takes nothing.
    capacity: how many entries can be taken out; those beyond are counted and stay.
    mask_velocity: the velocity is listed, and made 0, where the residual is.
    sample_every, sample_first: the blocks of 256 elements, counted from 0, whose magnitudes enter
        the histogram: sample_first, sample_first + sample_every, ...
    """

    threshold: float
    capacity: int
    mask_velocity: bool = True
    sample_every: int = 1
    sample_first: int = 0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is {self.threshold}; allowed: 0 or more, or inf for none")
        if self.capacity < 1:
            raise ValueError(f"capacity is {self.capacity}; allowed: 1 or more entries")
        if not 0 <= self.sample_first < self.sample_every:
            raise ValueError(
                f"sample_first is {self.sample_first}; allowed: 0 to sample_every - 1, which is "
                f"{self.sample_every - 1}"
            )

    @property
    def limit(self) -> float:
        """What magnitudes are compared with: NaN for inf, so that infinite ones stay, too."""
        return self.threshold if self.threshold < math.inf else math.nan


class Pass(NamedTuple):
    """What a pass over a tensor's buffers is given; ops.accumulate says what it does with it."""

    grad_N: Tensor | None
    correction: Correction
    residual: Buffer
    old_residual: Buffer | None
    velocity: Buffer | None
    old_velocity: Buffer | None
    scale: Tensor | None
    key: int
    selection: Selection | None = None
    lagged: bool = False
    lags: bool = False
    first: int = 0  # what is added to the indices that are listed

    @property
    def _values(self) -> Tensor:
        return tensors(self.residual)[0]

    @property
    def numel(self) -> int:
        return self._values.numel()

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def lists_velocities(self) -> bool:
        """Whether the velocity is listed, and made 0, where the residual is."""
        has_both = self.selection is not None and self.velocity is not None
        return has_both and self.selection.mask_velocity


def arithmetic_dtype(given: Pass) -> torch.dtype:
    """Return what a pass computes in: of the gradient, or without one of what is stored."""
    if given.grad_N is not None:
        return state_dtype(given.grad_N.dtype)
    stored = given.residual, given.old_residual, given.velocity, given.old_velocity
    is_double = any(isinstance(b, Tensor) and b.dtype == torch.float64 for b in stored)
    return torch.float64 if is_double else torch.float32


class Put(NamedTuple):
    """The next `count` of some positions are of this buffer, whose elements are `first` less."""

    buffer: Buffer
    count: int
    first: int
    key: int


@dataclass(frozen=True)
class Report:
    """What a pass saw.

    largest: the largest |gradient|.
    count: how many entries reach the threshold.
    histogram: (BINS,) int32 on the CPU, of |v| in the sampled blocks before anything was taken
        out, by the upper bits of the float. None from a pass without a selection.
    """

    largest: float
    count: int
    histogram: Tensor | None


@dataclass
class Found:
    """What a pass returns, on the buffers' device; the host has not waited for it.

    report: int32: (2,), or (2 + BINS,) with a selection. First the bits of the largest |gradient|
        as a float32 (a float64 gradient beyond its range counts as infinite); then the count, as 32
        bits without sign (at least 2^31, if it does not fit); then the histogram.
    indices, values, velocities: what was taken out, in the order in which it was listed. Unused
        room may follow.
    is_sorted: that order is ascending by index.
    first: what was added to the indices.
    count: the report's, as soon as `read_reports` has read it.
    """

    report: Tensor
    indices: Tensor
    values: Tensor
    velocities: Tensor | None
    is_sorted: bool = True
    first: int = 0
    count: int | None = None

    @property
    def largest(self) -> Tensor:
        """(1,) float32: max |x| of the gradient; infinite or NaN if an x is; 0 without one."""
        return self.report[:1].view(torch.float32)

    def entries(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what was taken out: indices (K,) int64 ascending, values and velocities (K,).

        Args: count: the report's. If it exceeds the capacity, only so many are here, and any of
            those that reach the threshold.
        """
        kept = (self.indices, self.values, self.velocities)
        indices_K, values_K, velocities_K = (x if x is None else x[:count] for x in kept)
        if self.is_sorted:
            return indices_K, values_K, velocities_K
        indices_K, order = indices_K.sort()
        return indices_K, values_K[order], None if velocities_K is None else velocities_K[order]


def read_reports(found: Sequence[Found]) -> list[Report]:
    """Read what several passes on one device saw, with one transfer, which waits for them."""
    return split_reports(found, join_reports(found).cpu()) if found else []


def join_reports(found: Sequence[Found]) -> Tensor:
    """Return what several passes on one device saw, there; `split_reports` reads it on the host."""
    return torch.cat([each.report for each in found])


def split_reports(found: Sequence[Found], joined: Tensor) -> list[Report]:
    """Read what `join_reports` returned, and was copied to the CPU."""
    sizes = [each.report.numel() for each in found]
    starts = numpy.cumsum([0, *sizes], dtype=numpy.int64)[:-1]
    numbers = joined.numpy()
    largest = numbers.view(numpy.float32)[starts].tolist()
    counts = numbers.view(numpy.uint32)[starts + 1].tolist()
    histograms = joined.split([part for size in sizes for part in (2, size - 2)])[1::2]
    for each, count in zip(found, counts, strict=True):
        each.count = count
    return [
        Report(most, count, histogram if size > 2 else None)
        for most, count, histogram, size in zip(largest, counts, histograms, sizes, strict=True)
    ]
