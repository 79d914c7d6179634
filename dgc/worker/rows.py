"""A step's row-sparse gradients, as they come: row numbers and rows.

Shapes: K rows of M elements each, of a tensor that has more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgc.worker.elements import TensorSpec, rows_of
from dgc.worker.scaling import scaled


class RowGradients:
    """Gradients by tensor, until they leave. Never as large as the tensor."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, grad: Tensor, scale: Tensor | None) -> None:
        """Take a sparse gradient (of all rows, M), times scale (1,); rows may repeat."""
        rows_K, values_KM = rows_of(grad)
        self._parts.setdefault(name, []).append((rows_K, scaled(values_KM, scale)))

    def drop(self, name: str) -> None:
        self._parts.pop(name, None)

    def release(self, spec: TensorSpec) -> tuple[Tensor, Tensor]:
        """Return, and forget, a tensor's gradient: ascending rows (K,), their sums (K, M)."""
        parts = self._parts.pop(spec.name, [])
        if not parts:
            none = torch.zeros(0, dtype=torch.int64, device=spec.device)
            return none, none.to(spec.dtype).view(0, spec.row_size)
        if len(parts) == 1:
            return parts[0]
        rows, values = (torch.cat(each) for each in zip(*parts, strict=True))
        size = (spec.whole // spec.row_size, spec.row_size)
        where = {"device": values.device, "check_invariants": False}
        summed = torch.sparse_coo_tensor(rows[None], values, size, **where)
        summed = summed.coalesce()
        return summed.indices()[0], summed.values()
