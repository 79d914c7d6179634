"""A bucket's entries on their way out of one worker's residuals, and on their way back.

Owns: which entries leave, by which statistic they are divided, and what must not be lost: what
coding takes off a value, and entries that do not arrive, return to the residual in its own units.
Shapes: K entries of a bucket; positions count through its tensors as if they were joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.step import Step
from dgc.selection.selector import largest_indices
from dgc.wire.buckets import Bucket
from dgc.wire.entries import Entries
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Taken
from dgc.worker.statistics import divide
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report


@dataclass(frozen=True)
class Outgoing:
    """A bucket whose entries are out of the residuals of the worker that `kept` is of.

    entries: what is to be sent, before rounding, in the bucket's dtype. taken: the same by tensor,
    in the residual's units. roots_K: what those were divided by; None for 1.
    """

    kept: Kept
    entries: Entries
    taken: list[tuple[str, Taken]]
    roots_K: Tensor | None

    def keep_lost(self, sent_K: Tensor) -> None:
        """Leave in the residual what rounding took off the entries, sent_K being what is left."""
        if sent_K is self.entries.values_M:
            return
        for name, part, span in self._by_tensor():
            sent, root = sent_K[span], None if self.roots_K is None else self.roots_K[span]
            back = sent if root is None else sent * root
            is_exact = sent == self.entries.values_M[span]
            lost = torch.where(is_exact, torch.zeros_like(back), part.values_K - back)
            self.kept.compensation.keep_lost(name, part.indices_K, lost)

    def put_back_the_rest(self, delivered_U: Tensor) -> int:
        """Undo the taking, to the bit, of entries that are not at the delivered positions (U,).

        Those ascend. Returns: how many went back.
        """
        is_back_K = ~self._is_delivered(delivered_U)
        for name, part, span in self._by_tensor():
            self.kept.compensation.put_back(name, part.where(is_back_K[span]))
        return int(is_back_K.sum())

    def _is_delivered(self, delivered_U: Tensor) -> Tensor:
        positions_K = self.entries.positions_K
        if delivered_U.numel() == 0:
            return torch.zeros_like(positions_K, dtype=torch.bool)
        at = torch.searchsorted(delivered_U, positions_K).clamp_(max=delivered_U.numel() - 1)
        return delivered_U[at] == positions_K

    def _by_tensor(self) -> Iterator[tuple[str, Taken, slice]]:
        start = 0
        for name, part in self.taken:
            end = start + part.indices_K.numel()
            if end > start:
                yield name, part, slice(start, end)
            start = end


def take_out(
    step: Step,
    bucket: Bucket,
    founds: Sequence[Found | None],
    reports: Sequence[Report | None],
    bad: set[int],
) -> Outgoing:
    """Move a bucket's entries out of the residuals; none of tensors in `bad`, or that rest.

    founds, reports: what `Step.read` returned. bad: numbers of tensors that cannot be used.
    """
    kept, taken, roots = step.kept, [], []
    for number, spec in enumerate(bucket.specs):
        if number in bad or founds[number] is None:
            chosen, root_K = Taken.nothing(spec.dtype, spec.device), None
        else:
            chosen = _select(kept, spec, founds[number], reports[number])
            root_K = kept.late_root(spec, chosen.indices_K)
        if root_K is not None and not root_K.all():
            # A statistic is 0 where squares underflow: these entries wait for a larger gradient.
            kept.compensation.put_back(spec.name, chosen.where(root_K == 0))
            chosen, root_K = chosen.where(root_K > 0), root_K[root_K > 0]
        taken.append((spec.name, chosen))
        roots.append(torch.ones_like(chosen.values_K) if root_K is None else root_K)
    # A residual of fewer bits gives float32 values, whatever the bucket's dtype.
    dtype = bucket.dtype
    positions_K, values_K = bucket.codec.join(
        [(part.indices_K, part.values_K.to(dtype)) for _, part in taken]
    )
    roots_K = torch.cat(roots) if kept.compression.preconditioning == "late" else None
    divided_K = values_K if roots_K is None else divide(values_K, roots_K)
    resting = tuple(number for number, found in enumerate(founds) if found is None)
    entries = Entries(positions_K, divided_K, tuple(sorted(bad)), resting)
    _count(step, bucket, taken, positions_K.numel())
    return Outgoing(kept, entries, taken, roots_K)


def _select(kept: Kept, spec: TensorSpec, found: Found, report: Report) -> Taken:
    selector = kept.thresholds[spec.name]
    if kept.compression.select_by == "raw":
        return selector.settle(found, report, kept.compensation, spec.name)
    magnitude_N = buffers.decode(kept.compensation.residual[spec.name]).abs()
    root_N = kept.root(spec)
    if root_N is not None:
        magnitude_N = divide(magnitude_N, root_N)
    indices_K = largest_indices(magnitude_N, selector.plan.k)
    return kept.compensation.take_exactly(spec.name, indices_K)


def _count(step: Step, bucket: Bucket, taken: list[tuple[str, Taken]], num_selected: int) -> None:
    step.stats.num_selected += num_selected
    step.stats.num_selectable += sum(spec.numel for spec in bucket.specs)
    for name, part in taken:
        if part.values_K.numel():
            step.stats.least_taken[name] = part.values_K.abs().min()


def keep_for_later(kept: Kept, bucket: Bucket, positions_K: Tensor, values_K: Tensor) -> bool:
    """Add to the residuals what is to be sent another time, (K,) as it would have been sent.

    Returns: False, and nothing is changed, where one could not be kept: a statistic is 0 there.
    """
    parts = bucket.codec.split(positions_K, values_K)
    roots = [kept.late_root(s, i) for s, (i, _) in zip(bucket.specs, parts, strict=True)]
    if any(root is not None and not root.all() for root in roots):
        return False
    for spec, (indices, values), root in zip(bucket.specs, parts, roots, strict=True):
        back = values if root is None else values * root
        kept.compensation.add(spec.name, indices, back)
    return True
