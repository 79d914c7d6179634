"""What leaves a worker: a bucket's entries, out of the residual, divided and rounded.

Owns: which entries, by which statistic they are divided, and their way back: what coding loses, and
what does not arrive, returns to the residual in the residual's own units.
Shapes: K entries of a bucket; positions count through its tensors as if they were joined.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgc.compression import Compression
from dgc.selection.selector import Selector, Taken, largest_indices
from dgc.wire.buckets import Bucket, TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.statistics import Statistics, divide
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.runtime.operands import Found, Report


@dataclass
class Outgoing:
    """Entries of a bucket that are out of the residual.

    positions_K int64 ascending; divided_K: what is to be sent, before rounding, in the bucket's
    dtype; roots_K:
    what the residual's values were divided by, None for 1; taken: the entries by tensor; bad,
    resting: the places in the bucket of tensors that cannot be used, or that rest.
    """

    positions_K: Tensor
    divided_K: Tensor
    roots_K: Tensor | None
    taken: list[tuple[str, Taken]]
    bad: tuple[int, ...]
    resting: tuple[int, ...]


class Outlet:
    """Takes entries out of one worker's residuals, and puts back what must not be lost.

    place: which share of every tensor is this worker's, from 0; statistics are of whole tensors.
    """

    def __init__(
        self,
        compression: Compression,
        compensation: Compensation,
        statistics: Statistics,
        place: int = 0,
    ) -> None:
        self.compression, self.compensation = compression, compensation
        self.statistics, self._place = statistics, place
        self.selectors: dict[str, Selector] = {}
        self._saved: dict[str, Tensor] = {}

    def plan(self, buckets: Sequence[Bucket]) -> None:
        """Take up the plans of the sparse buckets; thresholds carry over."""
        for bucket in buckets:
            for spec, plan in zip(bucket.specs, bucket.plans, strict=bucket.is_sparse):
                selector = self.selectors.setdefault(spec.name, Selector(plan))
                selector.plan = plan
                if spec.name in self._saved:
                    selector.load(self._saved.pop(spec.name))

    def commit(self) -> None:
        """Make the step's thresholds final."""
        for selector in self.selectors.values():
            selector.commit()

    def roll_back(self) -> None:
        for selector in self.selectors.values():
            selector.roll_back()

    def state_dict(self) -> dict[str, Tensor]:
        """Thresholds, by tensor."""
        return self._saved | {name: selector.state() for name, selector in self.selectors.items()}

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
        """Take up thresholds; those of tensors that are now sent densely wait for another plan."""
        self._saved = dict(state)
        for name, selector in self.selectors.items():
            selector.load(self._saved.pop(name, Selector(selector.plan).state()))

    def late_root(self, spec: TensorSpec, indices_K: Tensor | None = None) -> Tensor | None:
        """Return what this share's entries, or all of it, are divided by; None if they are not."""
        return self._root(spec, indices_K) if self.compression.preconditioning == "late" else None

    def _root(self, spec: TensorSpec, indices_K: Tensor | None = None) -> Tensor | None:
        begin = self._place * spec.numel
        if indices_K is not None:  # entries are never of the padding
            return self.statistics.root(spec.name, indices_K + begin if begin else indices_K)
        root_N = self.statistics.root(spec.name)
        if root_N is None or spec.numel == spec.whole:
            return root_N
        mine = root_N[begin : begin + spec.numel]
        return nn.functional.pad(mine, (0, spec.numel - mine.numel()))

    def take(
        self,
        bucket: Bucket,
        founds: Sequence[Found | None],
        reports: Sequence[Report | None],
        bad: set[int],
    ) -> Outgoing:
        """Move a bucket's entries out of the residuals; none of tensors in `bad`, or that rest."""
        taken: list[tuple[str, Taken]] = []
        roots: list[Tensor] = []
        for place, spec in enumerate(bucket.specs):
            if place in bad or founds[place] is None:
                chosen, root_K = Taken.nothing(spec.dtype, spec.device), None
            else:
                chosen = self._select(spec, founds[place], reports[place])
                root_K = self.late_root(spec, chosen.indices_K)
            if root_K is not None and not root_K.all():  # squares that underflow: not yet sendable
                self.compensation.put_back(spec.name, chosen.where(root_K == 0))
                chosen, root_K = chosen.where(root_K > 0), root_K[root_K > 0]
            taken.append((spec.name, chosen))
            roots.append(torch.ones_like(chosen.values_K) if root_K is None else root_K)
        dtype = bucket.dtype  # of what was selected in fewer bits, the values are float32
        positions_K, values_K = bucket.codec.join(
            [(part.indices_K, part.values_K.to(dtype)) for _, part in taken]
        )
        roots_K = torch.cat(roots) if self.compression.preconditioning == "late" else None
        divided_K = values_K if roots_K is None else divide(values_K, roots_K)
        resting = tuple(place for place, found in enumerate(founds) if found is None)
        return Outgoing(positions_K, divided_K, roots_K, taken, tuple(sorted(bad)), resting)

    def _select(self, spec: TensorSpec, found: Found, report: Report) -> Taken:
        if self.compression.select_by == "raw":
            selector = self.selectors[spec.name]
            return selector.settle(found, report, self.compensation, spec.name)
        magnitude_N = buffers.decode(self.compensation.residual[spec.name]).abs()
        root_N = self._root(spec)
        if root_N is not None:
            magnitude_N = divide(magnitude_N, root_N)
        indices_K = largest_indices(magnitude_N, self.selectors[spec.name].plan.k)
        return self.compensation.take_exactly(spec.name, indices_K)

    def keep_lost(self, outgoing: Outgoing, sent_K: Tensor) -> None:
        """Leave in the residual what rounding took off: (divided - sent), in its own units."""
        if sent_K is outgoing.divided_K:
            return
        for name, part, span in _by_tensor(outgoing):
            sent, root = sent_K[span], None if outgoing.roots_K is None else outgoing.roots_K[span]
            back = sent if root is None else sent * root
            is_exact = sent == outgoing.divided_K[span]
            lost = torch.where(is_exact, torch.zeros_like(back), part.values_K - back)
            self.compensation.keep_lost(name, part.indices_K, lost)

    def put_back(self, outgoing: Outgoing, is_back_K: Tensor) -> None:
        """Undo the taking of some entries, to the bit."""
        for name, part, span in _by_tensor(outgoing):
            self.compensation.put_back(name, part.where(is_back_K[span]))

    def add(self, bucket: Bucket, positions_K: Tensor, values_K: Tensor) -> bool:
        """Give the residuals what is to be sent another time, (K,) as it would have been sent.

        Returns: False, and nothing is changed, where one could not be kept: a statistic is 0 there.
        """
        parts = bucket.codec.split(positions_K, values_K)
        roots = [self.late_root(s, i) for s, (i, _) in zip(bucket.specs, parts, strict=True)]
        if any(root is not None and not root.all() for root in roots):
            return False
        for spec, (indices, values), root in zip(bucket.specs, parts, roots, strict=True):
            self.compensation.add(spec.name, indices, values if root is None else values * root)
        return True


def where_delivered(outgoing: Outgoing, delivered_U: Tensor) -> Tensor:
    """Return (K,) bool: whether each position is among the ascending delivered ones."""
    if delivered_U.numel() == 0:
        return torch.zeros_like(outgoing.positions_K, dtype=torch.bool)
    at = torch.searchsorted(delivered_U, outgoing.positions_K).clamp_(max=delivered_U.numel() - 1)
    return delivered_U[at] == outgoing.positions_K


def _by_tensor(outgoing: Outgoing) -> Iterator[tuple[str, Taken, slice]]:
    start = 0
    for name, part in outgoing.taken:
        end = start + part.indices_K.numel()
        if end > start:
            yield name, part, slice(start, end)
        start = end
