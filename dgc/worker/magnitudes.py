"""Whether a step's gradients can be used: by the largest magnitude of each tensor's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import Report

# Larger gradients count as infinite. In float32 sums of their squares would soon overflow and spoil
# a statistic. In float64 they would not; there the bound keeps sums of gradients within the range
# of float32 and bfloat16, in which reports are written, and residuals if asked for.
LARGEST_GRADIENT = {torch.float32: 2.0**40, torch.float64: 2.0**100}

_INFINITY = 0x7F800000  # as bits


class Magnitudes:
    """The largest magnitude that each tensor's gradients had in this step, as bits, (1,) int32, of
    a float32, also for float64 gradients.

    Bits order as magnitudes do, with NaN above infinity; nothing here waits for a GPU.
    """

    def __init__(self) -> None:
        self._bits: dict[str, Tensor] = {}

    def note(self, name: str, bits: Tensor) -> None:
        """Take in a largest magnitude, of which the memory is ours from now on."""
        before = self._bits.get(name)
        self._bits[name] = bits if before is None else torch.maximum(before, bits)

    def note_gradient(self, name: str, grad_N: Tensor) -> None:
        """Take in a gradient's, float32 or float64."""
        largest = largest_magnitude(grad_N).to(torch.float32)
        self.note(name, largest.view(1).view(torch.int32))

    def spoil_unless_finite(self, names: Iterable[str], tensors: Iterable[Tensor]) -> None:
        """Count these tensors' gradients as infinite if there is anything in `tensors` that is."""
        for tensor in tensors:
            is_bad = ~torch.isfinite(largest_magnitude(tensor))
            bits = is_bad.to(torch.int32).view(1) * _INFINITY
            for name in names:
                self.note(name, bits)

    def drop(self, name: str) -> None:
        self._bits.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self._bits

    def __getitem__(self, name: str) -> Tensor:
        return self._bits[name]


def largest_magnitude(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, 0-dim, NaN (without sign) if there is one; 0 of nothing.

    Makes nothing of the tensor's size, and takes a twelfth of torch's infinity norm on a CPU.
    """
    if not tensor.numel():
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    least, most = torch.aminmax(tensor)
    return torch.maximum(least.abs(), most.abs())


def is_usable(gradient: Tensor) -> Tensor:
    """Return, (), whether a gradient, float32 or float64, is finite and within bounds."""
    return (largest_magnitude(gradient) <= LARGEST_GRADIENT[gradient.dtype]).all()


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is infinite or NaN. Waits for a GPU."""
    return bool(torch.isfinite(largest_magnitude(tensor)).all())


def overflown(reports: Sequence[Report | None], dtype: torch.dtype) -> set[int]:
    """Return the numbers of the tensors whose gradient, of this dtype, cannot be used."""
    most = LARGEST_GRADIENT[dtype]
    return {n for n, found in enumerate(reports) if found and not found.largest <= most}
