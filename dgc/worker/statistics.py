"""Where a gradient is divided by the root of its second moment: early, late, or not here.

Owns: each tensor's statistic, which this worker feeds with its own dense gradients; a step's way
back. What a statistic is made of is the optimizer's: it hands over objects with this protocol.
Shapes: N elements of one flattened tensor, K selected of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from parsimony_kernels.runtime.checks import trusted_positions
from parsimony_kernels.runtime.kinds import by_kind


class Preconditioner(Protocol):
    """The second moment of one tensor. See optim.preconditioner."""

    tensors: dict[str, Tensor]
    """All its state, changed in place."""
    shared_names: Sequence[str]
    """Those whose mean over workers is the statistic of all."""

    @property
    def may_be_zero(self) -> bool:
        """Whether a root can be 0 anywhere."""

    def root(self, indices_K: Tensor | None = None) -> Tensor:
        """Return what to divide by, at indices or everywhere: 0 or more; float64 for a float64
        tensor, else float32."""

    @staticmethod
    def observe_together(
        given: Sequence[tuple[Preconditioner, Tensor, Tensor | None, int, bool]],
    ) -> None:
        """Take in one of a step's `num_parts` gradients of each of several tensors, times its scale
        (1,): (who is fed, grad_N, scale, num_parts, is_first)."""

    @staticmethod
    def roots_together(
        asked: Sequence[tuple[Preconditioner, int, int]], positions_K: Tensor
    ) -> Tensor:
        """Return the roots of several; see Statistics.roots_together."""


class Statistics:
    """The statistics of this worker's tensors, by name; a tensor may have none.

    share_intervals: by name, after how many steps a statistic is averaged over workers again; one
    that is not there never is. Each has its turn, so that few travel in one step.
    """

    def __init__(
        self,
        preconditioners: Mapping[str, Preconditioner] | None = None,
        share_intervals: Mapping[str, int] | None = None,
    ) -> None:
        self.preconditioners = dict(preconditioners or {})
        self.share_intervals = dict(share_intervals or {})
        self._before: dict[str, dict[str, Tensor]] = {}

    def observe(self, name: str, grad_N: Tensor, scale: Tensor | None, num_parts: int) -> None:
        """Feed a gradient, times scale (1,), to the tensor's statistic, if it has one."""
        self.observe_together([(name, grad_N, scale, num_parts)])

    def observe_together(self, given: Sequence[tuple[str, Tensor, Tensor | None, int]]) -> None:
        """Do as `observe` with the gradients of several tensors, each of another, on one device and
        of one dtype."""
        there = [each for each in given if each[0] in self.preconditioners]
        if not there:
            return
        first = [name for name, *_ in there if name not in self._before]
        self._keep_before(first)
        is_first = set(first)
        fed = [(self.preconditioners[name], *more, name in is_first) for name, *more in there]
        type(fed[0][0]).observe_together(fed)

    def _keep_before(self, names: Collection[str]) -> None:
        """Copy these statistics as they are before the step, those of a kind in one go."""
        tensors = {
            (name, part): tensor
            for name in names
            for part, tensor in self.preconditioners[name].tensors.items()
        }
        before: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for old in by_kind(tensors):
            new = {place: torch.empty_like(tensor) for place, tensor in old.items()}
            torch._foreach_copy_(list(new.values()), list(old.values()))
            for (name, part), copy in new.items():
                before[name][part] = copy
        self._before |= before  # now: a step that fails meanwhile is undone to what there is

    def root(self, name: str, indices_K: Tensor | None = None) -> Tensor | None:
        """Return what a tensor's entries are to be divided by; None if it has no statistic."""
        preconditioner = self.preconditioners.get(name)
        if preconditioner is None:
            return None
        with trusted_positions():  # they come from a selection
            return preconditioner.root(indices_K)

    def roots_together(
        self, asked: Sequence[tuple[str, int, int]], positions_K: Tensor
    ) -> Tensor | None:
        """Return what entries of several tensors are divided by, (K,); None if by nothing.

        asked: (name, count, first): the next `count` of the positions (K,) int64 are of this
        tensor, whose elements are `first` less.
        """
        there = [(self.preconditioners.get(name), count, first) for name, count, first in asked]
        have = [each[0] is not None for each in there]
        if not any(have):
            return None
        roots_of = next(type(each[0]) for each in there if each[0] is not None).roots_together
        with trusted_positions():  # they come from a selection
            if all(have):
                return roots_of(there, positions_K)
            parts = positions_K.split([count for _, count, _ in there])
            return torch.cat([
                roots_of([each], part) if has else torch.ones_like(part, dtype=torch.float32)
                for each, part, has in zip(there, parts, have, strict=True)
            ])  # fmt: skip

    def may_be_zero(self, name: str) -> bool:
        """Tell whether `root` of a tensor can be 0 anywhere."""
        return name in self.preconditioners and self.preconditioners[name].may_be_zero

    def due(self, step: int) -> list[str]:
        """Return the names whose statistics are averaged over workers in a step, from 0."""
        turns = enumerate(self.share_intervals.items())
        return [name for turn, (name, every) in turns if (step + turn) % every == 0]

    def shareable(self, names: Iterable[str]) -> list[str]:
        """Return those of the names whose statistics can be averaged over workers."""
        known = self.preconditioners
        return [name for name in names if name in known and known[name].shared_names]

    def pack(self, names: Sequence[str]) -> list[Tensor]:
        """Return these statistics as vectors, one for each dtype, to be averaged."""
        return [
            torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])
            for tensors in self._shared_tensors(names)
        ]

    def unpack(self, names: Sequence[str], means: Sequence[Tensor]) -> None:
        """Replace these statistics by their means over workers."""
        for mean, tensors in zip(means, self._shared_tensors(names), strict=True):
            parts = mean.split([tensor.numel() for tensor in tensors])
            views = [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
            torch._foreach_copy_(tensors, views)

    def _shared_tensors(self, names: Sequence[str]) -> list[list[Tensor]]:
        """Return the tensors of each dtype, in the order in which they first come."""
        found: dict[torch.dtype, list[Tensor]] = {}
        for preconditioner in map(self.preconditioners.get, names):
            for part in preconditioner.shared_names:
                tensor = preconditioner.tensors[part]
                found.setdefault(tensor.dtype, []).append(tensor)
        return list(found.values())

    def end_step(self, stands: bool) -> None:
        """Make the step's changes final if it stands; else undo them, to the bit."""
        for name in () if stands else list(self._before):
            self.drop(name)
        self._before.clear()

    def drop(self, name: str) -> None:
        """Undo what a tensor's gradients did in this step, to the bit."""
        before = self._before.pop(name, None)
        if before is not None:
            for part, tensor in self.preconditioners[name].tensors.items():
                tensor.copy_(before[part])

    def remove(self, name: str) -> bool:
        """Keep no statistic of a tensor any more; tell whether there was one."""
        self.drop(name)
        self.share_intervals.pop(name, None)
        return self.preconditioners.pop(name, None) is not None

    def num_bytes(self) -> int:
        return sum(t.nbytes for p in self.preconditioners.values() for t in p.tensors.values())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors only; this rank's, not the replica's."""
        return {name: dict(p.tensors) for name, p in self.preconditioners.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Take copies of a state that `check` has let pass; what it lacks stays as it is."""
        for name, parts in state.items():
            for part, tensor in self.preconditioners[name].tensors.items():
                tensor.copy_(parts[part])

    def check(self, state: dict[str, dict[str, Any]], added: Collection[str] = ()) -> None:
        """Raise ValueError if these statistics are kept otherwise than those here.

        added: names of tensors that were not there when it was saved: it need not have them.
        """
        mine, theirs = _shapes(self.state_dict()), _shapes(state)
        for name in sorted((mine.keys() - set(added)) | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"the saved statistic of {name} is {theirs.get(name)}; allowed: "
                    f"{mine.get(name)}, as here"
                )


def divide(values: Tensor, root: Tensor) -> Tensor:
    """Return values / root; 0 where root is 0, since no gradient has been there."""
    return torch.where(root == 0, torch.zeros_like(values), values / root)


def _shapes(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        name: {part: tuple(tensor.shape) for part, tensor in parts.items()}
        for name, parts in state.items()
    }
