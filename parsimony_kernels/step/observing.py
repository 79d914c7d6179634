"""Gradients that are fed to second moments, of which nothing is stepped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from parsimony_kernels.runtime.operands import Rule, Second


class Observed:
    """A second moment that is fed again and again.

    Whoever keeps it makes another when the memory of the moment changes. What an implementation
    prepares once is kept here: work, for gradients of this kind; program, of which this one is the
    first.
    """

    def __init__(self, second: Second) -> None:
        self.second = second
        self.kind: Any = None
        self.work: Any = None
        self.program: Any = None


class Observation(NamedTuple):
    """A dense gradient (n, m) for a second moment, times scale (1,) if there is one.

    rule: of which second_beta, second_gain and second_forgetting count; the rest is as in a rule
    without anything else.
    """

    observed: Observed
    grad: Tensor
    rule: Rule | SimpleNamespace
    scale: Tensor | None
