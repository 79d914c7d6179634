"""What one worker keeps from step to step, and takes with it through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dgc.compression import Compression
from dgc.selection.thresholds import Thresholds
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.statistics import Statistics
from dgc.worker.taken import Place
from dgc.worker.undoable import Undoable


class Kept:
    """A worker's residuals and velocities, statistics and thresholds.

    slice_index: which slice of every tensor the residuals are of, from 0; statistics are always of
        whole tensors.
    """

    def __init__(
        self,
        compression: Compression,
        compensation: Compensation,
        statistics: Statistics,
        slice_index: int = 0,
    ) -> None:
        self.compression, self._slice_index = compression, slice_index
        self.compensation, self.statistics = compensation, statistics
        self.thresholds = Thresholds()
        self._parts: tuple[Undoable, ...] = (compensation, statistics, self.thresholds)

    def end_step(self, stands: bool) -> None:
        """Make a step's changes final if it stands; else undo them, to the bit."""
        for part in self._parts:
            part.end_step(stands)

    def changes_gradients(self, name: str) -> bool:
        """Tell whether what leaves of a tensor that is sent whole is anything but its gradient."""
        compensation = self.compensation
        return (
            compensation.momentum != 0
            or compensation.has_residual(name)
            or name in self.statistics.preconditioners
        )

    def late_root(self, spec: TensorSpec, indices_K: Tensor | None = None) -> Tensor | None:
        """Return what entries of this slice, or all of it, are divided by as they leave.

        None if they are sent as they are: see Compression.preconditioning.
        """
        return self.root(spec, indices_K) if self.compression.preconditioning == "late" else None

    def late_roots(
        self, specs: Sequence[TensorSpec], places: Sequence[Place], positions_K: Tensor
    ) -> Tensor | None:
        """Return what entries of these tensors are divided by as they leave, (K,); None for 1."""
        if self.compression.preconditioning != "late":
            return None
        begins = {spec.name: self._slice_index * spec.numel for spec in specs}
        asked = [(name, count, first - begins[name]) for name, count, first in places if count]
        return self.statistics.roots_together(asked, positions_K)

    def root(self, spec: TensorSpec, indices_K: Tensor | None = None) -> Tensor | None:
        """Return the root of the second moment, at entries of this slice or of all of it."""
        begin = self._slice_index * spec.numel
        if indices_K is not None:  # entries never lie in the padding
            return self.statistics.root(spec.name, indices_K + begin if begin else indices_K)
        root_N = self.statistics.root(spec.name)
        if root_N is None or spec.numel == spec.whole:
            return root_N
        mine = root_N[begin : begin + spec.numel]
        return nn.functional.pad(mine, (0, spec.numel - mine.numel()))

    def state_dict(self) -> dict[str, Any]:
        return {
            "compensation": self.compensation.state_dict(),
            "statistics": self.statistics.state_dict(),
            "thresholds": self.thresholds.state_dict(),
        }

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of `state_dict` by kind: residual, velocity, statistics."""
        return {**self.compensation.num_bytes(), "statistics": self.statistics.num_bytes()}

    def load_state_dict(self, state: dict[str, Any], specs: Mapping[str, TensorSpec]) -> None:
        """Take up what `state_dict` returned; tensors that it does not know stay as they are.

        Raises: ValueError, before anything changes, for the state of tensors that are not in specs.
        """
        thresholds, statistics = state.get("thresholds", {}), state.get("statistics", {})
        self.thresholds.check(thresholds, specs.keys())
        kept = (state["compensation"]["residual"], state["compensation"]["velocity"], thresholds)
        self.statistics.check(statistics, added=specs.keys() - set().union(*kept))
        self.compensation.load_state_dict(state["compensation"], specs)
        self.statistics.load_state_dict(statistics)
        self.thresholds.load_state_dict(thresholds)
