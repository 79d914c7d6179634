"""Residuals that are one velocity behind, so that a step can be undone without a second one.

The new velocity of a step takes the gradient's place, beside the old one; the residual stays what
it was before the step, and the velocity that is to be added to it is added in the next step's pass.
A step that is undone just takes the old velocity again. So a step needs no memory but for gradient,
velocity and residual, and moves no more bytes than one that writes residuals anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Put


class _Write(NamedTuple):
    """What becomes of some entries of a residual, at positions that count from `first`.

    values_K: None for 0.
    """

    positions_K: Tensor
    values_K: Tensor | None
    first: int


class Lagging:
    """The names of the residuals that lag behind their velocity, and what a step's end writes.

    From its pass to the end of the step a residual is `open`: what the pass took out is still in
    it, and what else is to become of its entries is listed here.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._opened: dict[str, Found] = {}
        self._taken: dict[str, _Write] = {}  # in place of what was found
        self._writes: dict[str, list[_Write]] = {}
        # What was where `settle` has written into the residual itself, in order.
        self._undo: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def is_open(self, name: str) -> bool:
        return name in self._opened

    def is_written(self, name: str) -> bool:
        """Tell whether an open residual has been written to, so that undoing the step is more."""
        return bool(self._undo.get(name))

    def names(self) -> list[str]:
        """Return those that lag, open or not."""
        return [*self._names, *self._opened]

    def open(self, name: str, found: Found) -> None:
        """Take in what a pass found; its residual does not lag behind the old velocity any more."""
        self._names.discard(name)
        self._opened[name], self._writes[name] = found, []
        self._taken.pop(name, None)
        self._undo.setdefault(name, [])

    def write(self, name: str, positions_K: Tensor, values_K: Tensor, first: int) -> None:
        """Let these entries of an open residual, whose positions count from `first`, be values_K
        where the step ends."""
        self._writes[name].append(_Write(positions_K, values_K, first))

    def retake(self, name: str, positions_K: Tensor, first: int) -> None:
        """Let just these entries be out of an open residual, of what its only pass found."""
        self._taken[name] = _Write(positions_K, None, first)

    def settle(self, residuals: Mapping[str, Tensor], *, may_undo: bool = False) -> None:
        """Make open residuals, or copies of them, what lags behind the new velocities."""
        unread = [found for found in map(self._opened.get, residuals) if found.count is None]
        if unread:
            buffers.read_reports(unread)
        rounds = itertools.zip_longest(*map(self._writes_of, residuals))
        for each in rounds:  # the later write the same entries anew
            writes = [
                (residual, write)
                for residual, write in zip(residuals.values(), each, strict=True)
                if write is not None and write.positions_K.numel()
            ]
            if may_undo:
                self._note_undo(residuals, each)
            _put(writes)

    def _writes_of(self, name: str) -> list[_Write]:
        found = self._opened[name]
        taken = self._taken.get(name) or _Write(found.indices[: found.count], None, found.first)
        return [taken, *self._writes[name]]

    def _note_undo(self, residuals: Mapping[str, Tensor], writes: Sequence[_Write | None]) -> None:
        for (name, residual), write in zip(residuals.items(), writes, strict=True):
            if write is not None:
                indices_K = write.positions_K - write.first
                self._undo[name].append((indices_K, residual[indices_K]))

    def undo(self, name: str, residual: Tensor) -> None:
        """Take back what `settle` has written."""
        for indices_K, values_K in reversed(self._undo.pop(name, [])):
            residual[indices_K] = values_K

    def close(self, name: str, lags: bool) -> None:
        """Note that a residual is not open any more, and whether it lags from now on."""
        self._opened.pop(name, None)
        self._taken.pop(name, None)
        self._writes.pop(name, None)
        self._undo.pop(name, None)
        (self._names.add if lags else self._names.discard)(name)

    def open_names(self) -> list[str]:
        return list(self._opened)

    def clear(self) -> None:
        for part in (self._names, self._opened, self._taken, self._writes, self._undo):
            part.clear()


def _put(writes: Sequence[tuple[Tensor, _Write]]) -> None:
    """Write to these residuals: either all zeros, or none of them."""
    if not writes:
        return
    puts = [Put(residual, w.positions_K.numel(), w.first, 0) for residual, w in writes]
    values = [w.values_K for _, w in writes if w.values_K is not None]
    positions_K = torch.cat([w.positions_K for _, w in writes])
    buffers.put_together(puts, positions_K, torch.cat(values) if values else None)
