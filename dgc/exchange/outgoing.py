"""A bucket's entries on their way out of one worker's residuals, and on their way back.

Owns: which entries leave, by which statistic they are divided, and what must not be lost: what
coding takes off a value, and entries that do not arrive, return to the residual in its own units.
Shapes: K entries of a bucket; positions count through its tensors as if they were joined.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.question import Question
from dgc.exchange.step import Seen, Step
from dgc.selection.selector import Settling, largest_indices
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

        Those ascend. Returns: how many went back. On a GPU, waits for that number.
        """
        is_back_K = ~self._is_delivered(delivered_U)
        compensation, is_here = self.kept.compensation, is_back_K.device.type == "cpu"
        for name, part, span in self._by_tensor():
            if is_here:
                compensation.put_back(name, part.where(is_back_K[span]))
            else:
                compensation.put_back_where(name, part, is_back_K[span])
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


def take_out(step: Step, bucket: Bucket) -> Generator[Question, Any, Outgoing]:
    """Move a bucket's entries out of the residuals; none of tensors that cannot be used, or rest.

    Asks once; and again, for all tensors together, where passes found too few or too many, and
    where a statistic might be 0.
    """
    seen = yield from step.read(bucket)
    bad = step.bad_tensors(bucket, seen.reports)
    taken = yield from _select(step, bucket, seen, bad)
    with step.stats.timed("select"):
        roots = [
            step.kept.late_root(spec, part.indices_K) if part.indices_K.numel() else None
            for spec, part in zip(bucket.specs, taken, strict=True)
        ]
    yield from _leave_undivided(step.kept, bucket, taken, roots)
    with step.stats.timed("select"):
        return _outgoing(step, bucket, seen, taken, roots, bad)


def _outgoing(
    step: Step,
    bucket: Bucket,
    seen: Seen,
    taken: Sequence[Taken],
    roots: Sequence[Tensor | None],
    bad: set[int],
) -> Outgoing:
    # A residual of fewer bits gives float32 values, whatever the bucket's dtype.
    positions_K, values_K = bucket.codec.join(
        [(part.indices_K, part.values_K.to(bucket.dtype)) for part in taken]
    )
    roots_K = None
    if step.kept.compression.preconditioning == "late":
        pairs = zip(roots, taken, strict=True)
        roots_K = torch.cat([torch.ones_like(p.values_K) if r is None else r for r, p in pairs])
    divided_K = values_K if roots_K is None else divide(values_K, roots_K)
    resting = tuple(number for number, found in enumerate(seen.founds) if found is None)
    entries = Entries(positions_K, divided_K, tuple(sorted(bad)), resting)
    by_name = [(spec.name, part) for spec, part in zip(bucket.specs, taken, strict=True)]
    _count(step, bucket, by_name, positions_K.numel())
    return Outgoing(step.kept, entries, by_name, roots_K)


def _select(
    step: Step, bucket: Bucket, seen: Seen, bad: set[int]
) -> Generator[Question, Any, list[Taken]]:
    """Return the entries of each tensor. What passes over several found is asked for together."""
    taken = [Taken.nothing(spec.dtype, spec.device) for spec in bucket.specs]
    again: dict[int, Found] = {}
    ways: dict[int, Settling] = {}

    def go_on(number: int, report: Report | None) -> None:
        try:
            again[number] = ways[number].send(report)
        except StopIteration as end:
            taken[number] = end.value

    with step.stats.timed("select"):
        for number, (spec, found) in enumerate(zip(bucket.specs, seen.founds, strict=True)):
            if number in bad or found is None:
                continue
            if step.kept.compression.select_by == "preconditioned":
                taken[number] = _rank_divided(step.kept, spec)
                continue
            ways[number] = step.kept.thresholds[spec.name].settling(
                found, seen.reports[number], step.kept.compensation, spec.name, seen.counts[number]
            )
            go_on(number, None)
    while again:
        founds, numbers = list(again.values()), list(again)
        again.clear()
        (answer,) = yield Question([buffers.join_reports(founds)])
        with step.stats.timed("select"):
            reports = buffers.split_reports(founds, answer)
            for number, report in zip(numbers, reports, strict=True):
                go_on(number, report)
    return taken


def _rank_divided(kept: Kept, spec: TensorSpec) -> Taken:
    """Take a tensor's largest entries, as they will be divided. Waits for a GPU."""
    magnitude_N = buffers.decode(kept.compensation.residual[spec.name]).abs()
    root_N = kept.root(spec)
    if root_N is not None:
        magnitude_N = divide(magnitude_N, root_N)
    indices_K = largest_indices(magnitude_N, kept.thresholds[spec.name].plan.k)
    return kept.compensation.take_exactly(spec.name, indices_K)


def _leave_undivided(
    kept: Kept, bucket: Bucket, taken: list[Taken], roots: list[Tensor | None]
) -> Generator[Question, Any, None]:
    """Put entries back whose root is 0: a statistic is 0 where squares underflow, so these wait for
    a larger gradient."""
    doubtful = [
        number
        for number, (spec, root_K) in enumerate(zip(bucket.specs, roots, strict=True))
        if root_K is not None and kept.statistics.may_be_zero(spec.name)
    ]
    if not doubtful:
        return
    (are_fine,) = yield Question([torch.stack([roots[number].all() for number in doubtful]).long()])
    for number, is_fine in zip(doubtful, are_fine, strict=True):
        if not bool(is_fine):
            part, root_K = taken[number], roots[number]
            kept.compensation.put_back(bucket.specs[number].name, part.where(root_K == 0))
            taken[number], roots[number] = part.where(root_K > 0), root_K[root_K > 0]


def _count(step: Step, bucket: Bucket, taken: list[tuple[str, Taken]], num_selected: int) -> None:
    step.stats.num_selected += num_selected
    step.stats.num_selectable += sum(spec.numel for spec in bucket.specs)
    for name, part in taken:
        if part.values_K.numel():
            step.stats.least_taken[name] = part.values_K.abs().min()


def keep_for_later(
    kept: Kept, bucket: Bucket, parts: Sequence[tuple[Tensor, Tensor]]
) -> Generator[Question, Any, bool]:
    """Add to the residuals what is to be sent another time.

    parts: indices and values of each tensor, as they would have been sent.
    Returns: False, and nothing is changed, where one could not be kept: a statistic is 0 there.
    """
    roots = [kept.late_root(s, i) for s, (i, _) in zip(bucket.specs, parts, strict=True)]
    doubtful = [
        root_K
        for spec, root_K in zip(bucket.specs, roots, strict=True)
        if root_K is not None and kept.statistics.may_be_zero(spec.name)
    ]
    if doubtful:
        (are_fine,) = yield Question([torch.stack([root_K.all() for root_K in doubtful]).long()])
        if not all(map(bool, are_fine)):
            return False
    for spec, (indices, values), root in zip(bucket.specs, parts, roots, strict=True):
        back = values if root is None else values * root
        kept.compensation.add(spec.name, indices, back)
    return True
