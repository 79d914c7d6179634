"""What an operation is given, and what a selecting pass returns.

Shapes: n rows of m columns make the parameter's 2-D view; N elements of a flattened tensor, K
selected of them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace

import torch
from torch import Tensor

MAX_DEPTH = 5
MAX_ROWS = 2**31
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # native kernels step these
STEP_DTYPES = (*PARAMETER_DTYPES, torch.float64)  # parameters that can be stepped
STATE_DTYPES = (torch.float32, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state of a parameter of this dtype, and of the arithmetic on it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rule(ctypes.Structure):
    """The scalars of one update, held as float32; common.h has the same fields in the same order.

    What it was made from is kept, and steps a float64 parameter (1 - 0.999 in float32 is wrong in
    the eighth digit): `replace` a scalar, do not set the field.

    With g = sign * gradient + weight_decay * p (coupled decay; `sign` -1 maximizes):
        first moment   m  <- first_beta m + first_gain g          (of the update, for a Velocity)
        second moment  nu <- second_beta nu + second_gain g^2
        p <- decay p - lr (first_scale m) / (sqrt(second_scale nu + eps_inside) + eps_outside)
    where 0 / 0 is 0 and a finite m's quotient is kept within +-largest_quotient. A sketch inserts
    gain x - (its decay) query instead: for an average that forgets beta is 1 - decay, for a sum
    decay is 0. A sketched m of which all rows arrive is scaled by first_beta instead, which makes
    it the exact sketch of m. What the update takes for it is (w m' + (1 - w) g'), where m' is the
    moment that follows from the mean of the estimates by its buckets before this step, g' is the
    gradient with the weight that it gets in the long run, g first_gain / first_decay (first_gain g,
    if that is 0), and w = max(0, 1 - first_doubt (standard error of the mean / mean)^2). The
    defaults make plain gradient descent.
    """

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("lr", "decay", "weight_decay", "sign"),
            *("first_beta", "first_gain", "first_decay", "first_scale", "first_doubt"),
            *("second_beta", "second_gain", "second_decay", "second_scale"),
            *("eps_inside", "eps_outside", "largest_quotient"),
        )
    ]

    def __init__(self, lr: float, **scalars: float) -> None:
        self._given = {**_ONES, **scalars, "lr": lr}
        super().__init__(**self._given)
        if not scalars.keys() <= _RULE_NAMES:
            unknown = sorted(scalars.keys() - _RULE_NAMES)
            raise TypeError(f"Rule has no {', '.join(unknown)}")

    def scalars(self, dtype: torch.dtype) -> Rule | SimpleNamespace:
        """Return what steps a parameter of this dtype: this rule; for float64 what it came from."""
        if dtype != torch.float64:
            return self
        return SimpleNamespace(**{n: float(self._given.get(n, 0.0)) for n in _RULE_NAMES})

    def replace(self, **scalars: float) -> Rule:
        """Return a rule with other values for these scalars."""
        return Rule(**(self._given | scalars))


_RULE_NAMES = {name for name, _ in Rule._fields_}
_ONES = dict.fromkeys(
    ("decay", "sign", "first_beta", "first_gain", "first_scale", "first_doubt", "second_beta",
     "second_gain", "second_scale"), 1.0) | {"largest_quotient": math.inf}  # fmt: skip


@dataclass(frozen=True)
class Full:
    """One number for each element: values (n, m)."""

    values: Tensor


@dataclass(frozen=True)
class Velocity:
    """A first moment of the preconditioned updates instead of the gradients: values (n, m)."""

    values: Tensor


@dataclass(frozen=True)
class Cover:
    """SM3's accumulators: row (n,), col (m,); variant "II" or "I" of the paper."""

    row: Tensor
    col: Tensor
    variant: str = "II"


@dataclass(frozen=True)
class Factored:
    """Row means (n,) and column means (m,) of the squared gradients."""

    row: Tensor
    col: Tensor


@dataclass(frozen=True)
class Table:
    """A sketch over rows: values (depth, width, m) in the state's dtype, seeds (depth,) int64.

    The seeds are on the CPU.

    Signed: a count-sketch, whose estimate is the median; otherwise a count-min sketch.
    """

    values: Tensor
    seeds: Tensor
    signed: bool


First = Full | Velocity | Table | None
Second = Full | Cover | Factored | Table | None


class FirstKind(IntEnum):
    """A first moment's kind; common.h has the same numbers."""

    NONE = 0
    BEFORE = 1
    AFTER = 2
    SKETCH = 3

    @classmethod
    def of(cls, first: First) -> FirstKind:
        kinds = {Full: cls.BEFORE, Velocity: cls.AFTER, Table: cls.SKETCH}
        return kinds.get(type(first), cls.NONE)


class SecondKind(IntEnum):
    """A second moment's kind; common.h has the same numbers."""

    NONE = 0
    FULL = 1
    COVER = 2
    COVER_I = 3
    FACTORED = 4
    SKETCH = 5

    @classmethod
    def of(cls, second: Second) -> SecondKind:
        if isinstance(second, Cover):
            return cls.COVER_I if second.variant == "I" else cls.COVER
        kinds = {Full: cls.FULL, Factored: cls.FACTORED, Table: cls.SKETCH}
        return kinds.get(type(second), cls.NONE)


# ---- what a worker keeps of a flattened tensor: residual and velocity ----------------------------

BLOCK = 256  # elements that share a scale
MIN_SCALE = 1e-30  # of a block, so that one of zeros, or of denormal numbers, is divided safely
STORED_DTYPES = (torch.float32, torch.bfloat16)  # of a float64 tensor: float64 for float32
VELOCITY_KEY = 1 << 40  # a velocity is rounded by the residual's key with this bit changed


@dataclass(frozen=True)
class Blocks:
    """8 bits an element: codes (N,) int8, scales (ceil(N / 256),) float32; value = code * scale."""

    codes: Tensor
    scales: Tensor


Buffer = Tensor | Blocks
"""A flattened tensor as it is stored: float32, or float64; bfloat16, or 8-bit blocks."""


class Correction(ctypes.Structure):
    """Four float32 coefficients by which a gradient x joins velocity u and residual v:

    u <- u_decay u + u_gain x;  v <- v + (v_from_u u + v_gain x), with the new u.
    The defaults are those without velocity: v <- v + x. What they were given as is kept, for
    float64: see `scalars`.
    """

    _fields_ = [(name, ctypes.c_float) for name in ("u_decay", "u_gain", "v_from_u", "v_gain")]

    def __init__(
        self,
        u_decay: float = 0.0,
        u_gain: float = 0.0,
        v_from_u: float = 0.0,
        v_gain: float = 1.0,
    ) -> None:
        super().__init__(u_decay, u_gain, v_from_u, v_gain)
        self._given = u_decay, u_gain, v_from_u, v_gain

    def scalars(self, dtype: torch.dtype) -> Sequence[float]:
        """Return (u_decay, u_gain, v_from_u, v_gain) as gradients of this dtype meet them."""
        if dtype == torch.float64:
            return self._given
        return self.u_decay, self.u_gain, self.v_from_u, self.v_gain


# ---- selecting in that pass ----------------------------------------------------------------------

BIN_SHIFT = 20  # of a magnitude's 31 bits: 8 bins an octave, each 7 to 12.5% wide
BINS = 1 << (31 - BIN_SHIFT)


@dataclass(frozen=True)
class Selection:
    """Which entries of a residual v a pass takes out: those with |v| >= threshold, but no zeros.

    threshold: 0 or more; inf takes nothing.
    capacity: how many entries there is room for; what does not fit is counted and stays.
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
        """The threshold as it is compared: by one that is NaN, infinity is not above either."""
        return self.threshold if self.threshold < math.inf else math.nan


@dataclass(frozen=True)
class Report:
    """What a pass saw: the largest |gradient|, how many entries reach the threshold, and of the
    sampled blocks a histogram of |v|, before anything was taken out: (BINS,) int32 on the CPU, by
    the upper bits of the float; None from a pass without a selection.
    """

    largest: float
    count: int
    histogram: Tensor | None


@dataclass(frozen=True)
class Found:
    """What a pass leaves beside the buffers, all on their device; nothing here has waited for it.

    report: (2 + BINS,) int32, or (2,) without a selection: the bits of the largest |gradient| (in
        float32, also of float64 gradients, of which what is beyond that counts as infinite), the
        count (32 bits without sign; at least 2^31 where it is more), and the histogram.
    indices, values, velocities: what was taken out, in the order in which it was listed, where that
        is `is_sorted` by index; maybe with unused room behind.
    """

    report: Tensor
    indices: Tensor
    values: Tensor
    velocities: Tensor | None
    is_sorted: bool = True

    @property
    def largest(self) -> Tensor:
        """(1,) float32: max |x| of the gradient; infinite or NaN if an x is; 0 without one."""
        return self.report[:1].view(torch.float32)

    def entries(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what was taken out: indices (K,) int64 ascending, values and velocities (K,).

        Args: count: the report's. Beyond the capacity fewer are here, and which is not specified.
        """
        kept = (self.indices, self.values, self.velocities)
        indices_K, values_K, velocities_K = (x if x is None else x[:count] for x in kept)
        if self.is_sorted:
            return indices_K, values_K, velocities_K
        indices_K, order = indices_K.sort()
        return indices_K, values_K[order], None if velocities_K is None else velocities_K[order]


def read_reports(found: Sequence[Found]) -> list[Report]:
    """Read what several passes on one device saw, with one transfer, which waits for them."""
    if not found:
        return []
    sizes = [each.report.numel() for each in found]
    reports = torch.cat([each.report for each in found]).cpu().split(sizes)
    return [
        Report(
            largest=report[:1].view(torch.float32).item(),
            count=report[1].item() & 0xFFFFFFFF,
            histogram=report[2:] if report.numel() > 2 else None,
        )
        for report in reports
    ]
