"""Whether a step's gradients can be used: by the largest magnitude of each tensor's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels.operands import Report

# What is larger counts as infinite: sums of such squares would soon be, and spoil a statistic.
LARGEST_GRADIENT = 2.0**40


class Magnitudes:
    """The largest magnitude that each tensor's gradients had in this step, as bits, (1,) int32.

    Bits order as magnitudes do, with NaN above infinity; nothing here waits for a GPU.
    """

    def __init__(self) -> None:
        self._bits: dict[str, Tensor] = {}

    def note(self, name: str, bits: Tensor) -> None:
        """Take in a largest magnitude."""
        before = self._bits.get(name)
        self._bits[name] = bits.clone() if before is None else torch.maximum(before, bits)

    def note_gradient(self, name: str, grad_N: Tensor) -> None:
        """Take in a gradient's, float32."""
        self.note(name, largest_magnitude(grad_N).view(1).view(torch.int32))

    def spoil(self, names: Iterable[str], device: torch.device) -> None:
        """Count these tensors' gradients as infinite."""
        for name in names:
            self.note(name, torch.full((1,), math.inf, device=device).view(torch.int32))

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[name]


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, 0-dim, NaN (without sign) if there is one; 0 of nothing.

    Makes nothing of the tensor's size, and takes a twelfth of torch's infinity norm on a CPU.
    """
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    least, most = torch.aminmax(tensor)
    return torch.maximum(least.abs(), most.abs())


def is_usable(gradient: Tensor) -> bool:
    """Tell whether a gradient is finite and within bounds. Waits for a GPU."""
    return bool((largest_magnitude(gradient) <= LARGEST_GRADIENT).all())


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is infinite or NaN. Waits for a GPU."""
    return bool(torch.isfinite(largest_magnitude(tensor)).all())


def overflown(reports: Sequence[Report]) -> set[int]:
    """Return the places of tensors whose gradient cannot be used."""
    return {n for n, found in enumerate(reports) if not found.largest <= LARGEST_GRADIENT}
