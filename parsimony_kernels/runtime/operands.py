"""What a step is given: the rule, and the kinds of state that a parameter may have.

abi.h has the same structures and numbers.
Shapes: n rows of m columns make the parameter's 2-D view.
"""

from __future__ import annotations

import ctypes
import math
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


class Storage(IntEnum):
    """How a tensor's elements are stored."""

    ABSENT = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    BLOCKS = 4  # see buffers.operands.Blocks

    @classmethod
    def of(cls, dtype: torch.dtype) -> Storage:
        return cls(1 + PARAMETER_DTYPES.index(dtype))


class Rule(ctypes.Structure):
    """The scalars of one update, held as float32. The defaults make plain gradient descent.

    With g = sign * gradient + weight_decay * p (coupled weight decay; `sign` -1 maximizes):
        first moment   m  <- first_beta m + first_gain g    (MomentOfUpdates: of the update, not g)
        second moment  nu <- second_beta nu + second_gain g^2
        p <- param_scale p - lr (first_scale m) / (sqrt(second_scale nu + eps_inside) + eps_outside)
    where 0 / 0 is 0 and a finite m's quotient is kept within +-largest_quotient.

    A sketch cannot be scaled for some rows alone. It inserts gain x - forgetting query instead:
    for an average, forgetting is 1 - beta; for a sum it is 0. If all rows arrive, a sketched m is
    scaled by first_beta after all, which makes it the exact sketch of m.
    The update takes w m' + (1 - w) g' for a sketched m. m' is the moment that follows from the mean
    of the estimates by the entry's buckets before this step. g' is the gradient with the weight
    that it gets in the long run, g first_gain / first_forgetting (first_gain g, if that is 0).
    w = max(0, 1 - first_doubt (standard error of the mean / mean)^2).
    For a sketched nu it takes second_beta q + second_gain g^2; q is the estimate before this step.

    The values that a rule is made from are kept for float64 parameters (1 - 0.999 in float32 is
    wrong in the eighth digit). So `replace` a scalar; do not set the field.
    """

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            *("lr", "param_scale", "weight_decay", "sign"),
            *("first_beta", "first_gain", "first_forgetting", "first_scale", "first_doubt"),
            *("second_beta", "second_gain", "second_forgetting", "second_scale"),
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
    ("param_scale", "sign", "first_beta", "first_gain", "first_scale", "first_doubt", "second_beta",
     "second_gain", "second_scale"), 1.0) | {"largest_quotient": math.inf}  # fmt: skip


@dataclass(frozen=True)
class Full:
    """One number for each element: values (n, m)."""

    values: Tensor


@dataclass(frozen=True)
class MomentOfUpdates:
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
    signed: it is a count-sketch, whose estimate is the median; otherwise a count-min sketch.
    """

    values: Tensor
    seeds: Tensor
    signed: bool


class Sketch(ctypes.Structure):
    """A table, as the kernels are given it."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("width", "dim")),
        ("seeds", ctypes.c_int64 * MAX_DEPTH),
        *((name, ctypes.c_int) for name in ("depth", "is_signed")),
    ]

    @classmethod
    def of(cls, table: Table) -> Sketch:
        depth, width, dim = table.values.shape
        seeds = (ctypes.c_int64 * MAX_DEPTH)(*table.seeds.tolist())
        return cls(table.values.data_ptr(), width, dim, seeds, depth, table.signed)


First = Full | MomentOfUpdates | Table | None
Second = Full | Cover | Factored | Table | None


class FirstKind(IntEnum):
    """Where a first moment comes from: gradients, kept in full or in a sketch, or updates."""

    NONE = 0
    OF_GRADIENTS = 1
    OF_UPDATES = 2
    SKETCH = 3

    @classmethod
    def of(cls, first: First) -> FirstKind:
        kinds = {Full: cls.OF_GRADIENTS, MomentOfUpdates: cls.OF_UPDATES, Table: cls.SKETCH}
        return kinds.get(type(first), cls.NONE)


class SecondKind(IntEnum):
    """How a second moment is kept. COVER is SM3-II, COVER_I is SM3-I."""

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
