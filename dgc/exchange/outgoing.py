"""A bucket's entries on their way out of one worker's residuals, and on their way back.

Owns: which entries leave, by which statistic they are divided, and what must not be lost: what
coding takes off a value, and entries that do not arrive, return to the residual in its own units.
Shapes: K entries of a bucket; positions count through its tensors as if they were joined.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.question import Question
from dgc.exchange.selecting import select
from dgc.exchange.step import Step
from dgc.wire.buckets import Bucket
from dgc.wire.entries import Entries
from dgc.worker.statistics import divide
from dgc.worker.taken import Place, TakenTogether, spans


@dataclass(frozen=True)
class Outgoing:
    """A bucket whose entries are out of the residuals of the worker that `kept` is of.

    entries: what is to be sent, before rounding, in the bucket's dtype. taken: the same in the
    residuals' units. roots_K: what those were divided by; None for 1.
    """

    kept: Kept
    entries: Entries
    taken: TakenTogether
    roots_K: Tensor | None

    def keep_lost(self, sent_K: Tensor) -> None:
        """Leave in the residual what rounding took off the entries, sent_K being what is left."""
        if sent_K is self.entries.values_M:
            return
        back_K = sent_K if self.roots_K is None else sent_K * self.roots_K
        is_exact = sent_K == self.entries.values_M
        lost_K = torch.where(is_exact, torch.zeros_like(back_K), self.taken.values_K - back_K)
        self.kept.compensation.keep_lost_together(self.taken.places, self.taken.positions_K, lost_K)

    def put_back_the_rest(self, delivered_U: Tensor) -> int:
        """Undo the taking, to the bit, of entries that are not at the delivered positions (U,).

        Those ascend. Returns: how many went back. On a GPU, waits for that number.
        """
        is_back_K = ~self._is_delivered(delivered_U)
        compensation = self.kept.compensation
        if is_back_K.device.type == "cpu":
            rest = self.taken.where(is_back_K)
            compensation.put_back_together(rest)
            return rest.positions_K.numel()
        parts = zip(spans(self.taken.places), self.taken.by_tensor(), strict=True)
        for (_, span), (name, part) in parts:
            compensation.put_back_where(name, part, is_back_K[span])
        return int(is_back_K.sum())

    def _is_delivered(self, delivered_U: Tensor) -> Tensor:
        positions_K = self.entries.positions_K
        if delivered_U.numel() == 0:
            return torch.zeros_like(positions_K, dtype=torch.bool)
        at = torch.searchsorted(delivered_U, positions_K).clamp_(max=delivered_U.numel() - 1)
        return delivered_U[at] == positions_K


def take_out(step: Step, bucket: Bucket) -> Generator[Question, Any, Outgoing]:
    """Move a bucket's entries out of the residuals; none of tensors that cannot be used, or rest.

    Asks once; and again, for all tensors together, where passes found too few or too many, and
    where a statistic might be 0.
    """
    seen = yield from step.read(bucket)
    bad = step.bad_tensors(bucket, seen.reports)
    taken = yield from select(step, bucket, seen, bad)
    with step.stats.timed("select"):
        roots_K = step.kept.late_roots(bucket.specs, taken.places, taken.positions_K)
    taken, roots_K = yield from _leave_undivided(step.kept, taken, roots_K)
    with step.stats.timed("select"):
        # A residual of fewer bits gives float32 values, whatever the bucket's dtype.
        values_K = taken.values_K.to(bucket.dtype)
        divided_K = values_K if roots_K is None else divide(values_K, roots_K)
        resting = tuple(number for number, found in enumerate(seen.founds) if found is None)
        entries = Entries(taken.positions_K, divided_K, tuple(sorted(bad)), resting)
        step.stats.note_taken(taken, sum(spec.numel for spec in bucket.specs))
        return Outgoing(step.kept, entries, taken, roots_K)


def _leave_undivided(
    kept: Kept, taken: TakenTogether, roots_K: Tensor | None
) -> Generator[Question, Any, tuple[TakenTogether, Tensor | None]]:
    """Put entries back whose root is 0: a statistic is 0 where squares underflow, so these wait for
    a larger gradient."""
    if roots_K is None or not any(_may_be_zero(kept, place) for place in taken.places):
        return taken, roots_K
    (is_fine,) = yield Question([roots_K.all().view(1).long()])
    if bool(is_fine):
        return taken, roots_K
    is_divided_K = roots_K > 0
    kept.compensation.put_back_together(taken.where(~is_divided_K))
    return taken.where(is_divided_K), roots_K[is_divided_K]


def _may_be_zero(kept: Kept, place: Place) -> bool:
    return place.count > 0 and kept.statistics.may_be_zero(place.name)


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
