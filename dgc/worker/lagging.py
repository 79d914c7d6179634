"""Residuals that are one velocity behind, so that a step can be undone without a second one.

The new velocity of a step takes the gradient's place, beside the old one; the residual stays what
it was before the step, and the velocity that is to be added to it is added in the next step's pass.
A step that is undone just takes the old velocity again. So a step needs no memory but for gradient,
velocity and residual, and moves no more bytes than one that writes residuals anew.
"""

from __future__ import annotations

from torch import Tensor

from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found


class Lagging:
    """The names of the residuals that lag behind their velocity, and what a step's end writes.

    From its pass to the end of the step a residual is `open`: what the pass took out is still in
    it, and what else is to become of its entries is listed here.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._found: dict[str, Found] = {}
        self._writes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        # What was where `settle` has written into the residual itself, in order.
        self._undo: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def is_open(self, name: str) -> bool:
        return name in self._found

    def is_written(self, name: str) -> bool:
        """Tell whether an open residual has been written to, so that undoing the step is more."""
        return bool(self._undo.get(name))

    def names(self) -> list[str]:
        """Return those that lag, open or not."""
        return [*self._names, *self._found]

    def open(self, name: str, found: Found) -> None:
        """Take in what a pass found; its residual does not lag behind the old velocity any more."""
        self._names.discard(name)
        self._found[name], self._writes[name] = found, []
        self._undo.setdefault(name, [])

    def write(self, name: str, indices_K: Tensor, values_K: Tensor) -> None:
        """Let these entries of an open residual be values_K where the step ends."""
        self._writes[name].append((indices_K, values_K))

    def settle(self, name: str, residual: Tensor, *, may_undo: bool = False) -> None:
        """Make an open residual, or a copy of it, what lags behind the new velocity."""
        found = self._found[name]
        if found.count is None:
            buffers.read_reports([found])
        taken_K = found.indices[: found.count]
        writes = [(taken_K, residual.new_zeros(taken_K.shape)), *self._writes[name]]
        for indices_K, values_K in writes:
            if may_undo:
                self._undo[name].append((indices_K, residual[indices_K]))
            residual[indices_K] = values_K.to(residual.dtype)

    def undo(self, name: str, residual: Tensor) -> None:
        """Take back what `settle` has written."""
        for indices_K, values_K in reversed(self._undo.pop(name, [])):
            residual[indices_K] = values_K

    def close(self, name: str, lags: bool) -> None:
        """Note that a residual is not open any more, and whether it lags from now on."""
        self._found.pop(name, None)
        self._writes.pop(name, None)
        self._undo.pop(name, None)
        (self._names.add if lags else self._names.discard)(name)

    def open_names(self) -> list[str]:
        return list(self._found)

    def clear(self) -> None:
        for part in (self._names, self._found, self._writes, self._undo):
            part.clear()
