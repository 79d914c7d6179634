"""Sketches in plain torch: where rows hash to, how values that meet there are added, estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from parsimony_kernels.runtime.operands import Table


def mix(x: Tensor) -> Tensor:
    """Scramble 32-bit numbers, held as int64, as `mix` in arithmetic.h does."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def hash_rows(table: Table, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's bucket (depth, k) int64, counted through all of the table, and its sign."""
    width = table.values.shape[1]
    buckets, signs = [], []
    for j, seed in enumerate(table.seeds.tolist()):
        low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        hashed = mix(mix((rows & 0xFFFFFFFF) ^ low) ^ high)
        buckets.append(j * width + ((hashed * width) >> 32))
        signs.append(1.0 - 2.0 * (hashed & 1).to(table.values.dtype))
    return torch.stack(buckets), torch.stack(signs)


def ordered_sum(slots: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum values (k, ...) that share a slot, one after another in their order, starting from 0.

    Returns: the slots that occur, ascending; their sums; how many values each has.
    """
    unique, inverse, counts = slots.unique(return_inverse=True, return_counts=True)
    order = inverse.argsort(stable=True)
    starts = (counts.cumsum(0) - counts)[inverse[order]]
    turn = torch.arange(len(order), device=order.device) - starts
    sums = values.new_zeros(len(unique), *values.shape[1:])
    for i in range(int(counts.max()) if len(counts) else 0):
        items = order[turn == i]
        sums[inverse[items]] += values[items]
    return unique, sums, counts


def _estimate(table: Table, candidates: Tensor) -> Tensor:
    """Return the minimum over axis 0, or the median; of an even depth, the middle two's mean."""
    if not table.signed:
        return candidates.amin(0)
    ordered, depth = candidates.sort(0).values, len(candidates)
    median = ordered[depth // 2]
    if depth % 2 == 0:
        median = (ordered[depth // 2 - 1] + median) * 0.5
    return torch.where(ordered[-1].isnan(), ordered[-1], median)  # where sorting puts any NaN


class Cells:
    """The cells of a table that k rows, or k elements, hash to: (depth, k) numbers into `flat`."""

    def __init__(self, table: Table, rows: Tensor, columns: Tensor | None = None) -> None:
        self.table = table
        self.cells, signs = hash_rows(table, rows)
        dim = table.values.shape[2]
        if columns is None:
            self.flat = table.values.flatten(0, 1)
            self.signs = signs[:, :, None] if table.signed else torch.ones_like(signs[:, :, None])
        else:
            self.cells = self.cells * dim + columns
            self.flat = table.values.view(-1)
            self.signs = signs if table.signed else torch.ones_like(signs)

    def candidates(self) -> Tensor:
        return self.flat[self.cells] * self.signs

    def query(self) -> Tensor:
        return _estimate(self.table, self.candidates())

    def update(self, x: Tensor, gain: float, forgetting: float, keep: float = 1.0) -> None:
        """Scale by `keep`, and insert gain * x - forgetting * (the query from before)."""
        estimate = self.query() if forgetting else torch.zeros_like(x)
        for cells, signs in zip(self.cells, self.signs, strict=True):
            rate = self._bounded_forgetting(cells, forgetting)
            change = (x * gain - estimate * (rate[:, None] if x.dim() == 2 else rate)) * signs
            unique, sums, _ = ordered_sum(cells, change)
            new = self.flat[unique] * keep + sums
            self.flat[unique] = new if self.table.signed else new.clamp_min(0)

    def _bounded_forgetting(self, cells: Tensor, forgetting: float) -> Tensor:
        _, inverse, counts = cells.unique(return_inverse=True, return_counts=True)
        count, most = counts[inverse].to(self.flat.dtype), 2 if self.table.signed else 1
        full = torch.full_like(count, forgetting)
        return torch.where(count * forgetting <= most, full, most / count)
