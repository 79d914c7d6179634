"""A step's row-sparse gradients, as they come: row numbers and rows.

Shapes: K rows of M elements each, of a tensor that has more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgc.buckets import TensorSpec
from dgc.scaling import scaled


class RowGradients:
    """Gradients by tensor, until they leave. Never as large as the tensor."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, rows_K: Tensor, values_KM: Tensor, scale: Tensor | None) -> None:
        """Take a gradient, times scale (1,); rows may repeat."""
        self._parts.setdefault(name, []).append((rows_K, scaled(values_KM, scale)))

    def release(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Return, and forget, a tensor's gradient: ascending rows (K,), their sums (K, M)."""
        parts = self._parts.pop(spec.name, [])
        none = torch.zeros(0, dtype=torch.int64, device=spec.device)
        rows = torch.cat([none, *(rows for rows, _ in parts)])
        values = torch.cat([none.view(0, spec.row_size).float(), *(values for _, values in parts)])
        size = (spec.whole // spec.row_size, spec.row_size)
        summed = torch.sparse_coo_tensor(rows[None], values, size, check_invariants=False)
        summed = summed.coalesce()
        return summed.indices()[0], summed.values()
