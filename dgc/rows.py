"""A step's row-sparse gradients, as they come: row numbers and rows.

Shapes: K rows of M elements each, of a tensor that has more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgc.buckets import TensorSpec
from dgc.scaling import scaled


class RowGradients:
    """Gradients by tensor, until they leave. Never as large as the tensor."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, grad: Tensor, scale: Tensor | None) -> None:
        """Take a sparse gradient (of all rows, M), times scale (1,); rows may repeat."""
        grad = grad.coalesce()  # itself, where it is
        values_KM = grad.values().reshape(-1, math.prod(grad.shape[1:])).contiguous()
        values_KM = scaled(values_KM, scale)
        self._parts.setdefault(name, []).append((grad.indices()[0], values_KM))

    def release(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Return, and forget, a tensor's gradient: ascending rows (K,), their sums (K, M)."""
        parts = self._parts.pop(spec.name, [])
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=spec.device)
            return none, torch.zeros(0, spec.row_size, device=spec.device)
        if len(parts) == 1:
            return parts[0]
        rows, values = (torch.cat(each) for each in zip(*parts, strict=True))
        size = (spec.whole // spec.row_size, spec.row_size)
        summed = torch.sparse_coo_tensor(rows[None], values, size, check_invariants=False)
        summed = summed.coalesce()
        return summed.indices()[0], summed.values()
