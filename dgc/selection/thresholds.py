"""The thresholds of all of a worker's tensors, from step to step and through checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from dgc.selection.plan import SparsityPlan
from dgc.selection.selector import Selector


class Thresholds:
    """A selector for each tensor that has ever been sent sparsely, by name."""

    def __init__(self) -> None:
        self._selectors: dict[str, Selector] = {}
        self._saved: dict[str, Tensor] = {}  # loaded, for tensors without a selector yet

    def __getitem__(self, name: str) -> Selector:
        return self._selectors[name]

    def follow(self, plans: Mapping[str, SparsityPlan]) -> None:
        """Select by these plans from the next step on; the thresholds carry over."""
        for name, plan in plans.items():
            selector = self._selectors.setdefault(name, Selector(plan))
            selector.plan = plan
            if name in self._saved:
                selector.load(self._saved.pop(name))

    def open_cuts(self) -> dict[str, Tensor]:
        """Return, by tensor, what `tell_cuts` wants to know as numbers before the step ends."""
        cuts = {name: selector.open_cut for name, selector in self._selectors.items()}
        return {name: cut for name, cut in cuts.items() if cut is not None}

    def tell_cuts(self, cuts: Mapping[str, float]) -> None:
        for name, cut in cuts.items():
            self._selectors[name].tell_cut(cut)

    def end_step(self, stands: bool) -> None:
        """Take the step's thresholds as final if it stands; else forget them."""
        for selector in self._selectors.values():
            selector.end_step(stands)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the thresholds, by tensor."""
        return self._saved | {name: selector.state() for name, selector in self._selectors.items()}

    @staticmethod
    def check(state: Mapping[str, Tensor], names: Collection[str]) -> None:
        """Raise ValueError for a state of other tensors than those of these names."""
        for name, threshold in state.items():
            if name not in names:
                raise ValueError(f"the saved threshold of {name} is of no tensor here")
            try:
                Selector.check(threshold)
            except ValueError as error:
                raise ValueError(f"the saved threshold of {name}: {error}") from error

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up thresholds; those of tensors that are now sent densely wait for `follow`."""
        self._saved = dict(state)
        for name, selector in self._selectors.items():
            selector.load(self._saved.pop(name, Selector(selector.plan).state()))


def merged_thresholds(states: Sequence[Mapping[str, Tensor]], scale: float) -> dict[str, Tensor]:
    """Return what a new worker begins with, given `Thresholds.state_dict` of those before it.

    Of each tensor the mean threshold, times `scale`, as what to start from.
    """
    merged = {}
    for name in dict.fromkeys(name for state in states for name in state):
        merged[name] = Selector.merged([state[name] for state in states if name in state], scale)
    return merged
