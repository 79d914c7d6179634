"""What an operation is given: the scalars of its rule, and the ways to keep a moment.

Shapes: n rows of m columns make the parameter's 2-D view.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

MAX_DEPTH = 5
MAX_ROWS = 2**31
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Rule(ctypes.Structure):
    """The scalars of one update, held as float32; common.h has the same fields in the same order.

    With g = sign * gradient + weight_decay * p (coupled decay; `sign` -1 maximizes):
        first moment   m  <- first_beta m + first_gain g          (of the update, for a Velocity)
        second moment  nu <- second_beta nu + second_gain g^2
        p <- decay p - lr (first_scale m) / (sqrt(second_scale nu + eps_inside) + eps_outside)
    where 0 / 0 is 0. A sketch inserts gain x - (its decay) query instead: for an average that
    forgets beta is 1 - decay, for a sum decay is 0. The defaults make plain gradient descent.
    """

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("lr", "decay", "weight_decay", "sign"),
            *("first_beta", "first_gain", "first_decay", "first_scale"),
            *("second_beta", "second_gain", "second_decay", "second_scale"),
            *("eps_inside", "eps_outside"),
        )
    ]

    def __init__(self, lr: float, **scalars: float) -> None:
        super().__init__(lr=lr, **(_ONES | scalars))
        unknown = scalars.keys() - _RULE_NAMES
        if unknown:
            raise TypeError(f"Rule has no {', '.join(sorted(unknown))}")


_RULE_NAMES = {name for name, _ in Rule._fields_}
_ONES = dict.fromkeys(
    ("decay", "sign", "first_beta", "first_gain", "first_scale", "second_beta", "second_gain",
     "second_scale"), 1.0)  # fmt: skip


@dataclass(frozen=True)
class Full:
    """One float32 for each element: values (n, m)."""

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
    """A sketch over rows: values (depth, width, m) float32, seeds (depth,) int64 on the CPU.

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
STORED_DTYPES = (torch.float32, torch.bfloat16)
VELOCITY_KEY = 1 << 40  # a velocity is rounded by the residual's key with this bit changed


@dataclass(frozen=True)
class Blocks:
    """8 bits an element: codes (N,) int8, scales (ceil(N / 256),) float32; value = code * scale."""

    codes: Tensor
    scales: Tensor


Buffer = Tensor | Blocks
"""A flattened tensor as it is stored: float32, bfloat16, or 8-bit blocks."""


class Correction(ctypes.Structure):
    """Four float32 coefficients by which a gradient x joins velocity u and residual v:

    u <- u_decay u + u_gain x;  v <- v + (v_from_u u + v_gain x), with the new u.
    The defaults are those without velocity: v <- v + x.
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
