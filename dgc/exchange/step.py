"""One worker's state of a step, from its first gradient until the ranks have agreed on an update.

Owns: what the step's gradients came to so far, which tensors rest, and because of which all ranks
must undo the step. What a worker keeps from step to step is in kept.py.
Shapes: N elements of one flattened tensor, or of this rank's slice of it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.question import Question
from dgc.wire.buckets import Bucket
from dgc.worker.elements import TensorSpec
from dgc.worker.magnitudes import Magnitudes, overflown
from dgc.worker.residual import Gradient
from dgc.worker.rows import RowGradients
from dgc.worker.scaling import scaled
from dgc.worker.statistics import divide
from dgc.worker.stats import StepStats
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report, Selection
from parsimony_kernels.runtime.operands import state_dtype

# Bytes of gradients that wait on a CPU for others of their bucket, so that all are taken in
# together: about what its cache holds. On a GPU, where each launch costs, all of a bucket wait.
MOST_WAITING_BYTES = 16 * 2**20


class Seen(NamedTuple):
    """What the passes over a bucket's tensors saw, by number; None for those that rest.

    counts: of the residual, how many elements are not 0; None where that was not counted.
    """

    founds: list[Found | None]
    reports: list[Report | None]
    counts: list[int | None]


class Given(NamedTuple):
    """A gradient that was given to the exchange; see Exchange.add."""

    name: str
    grad_N: Tensor
    scale: Tensor | None
    num_parts: int
    is_last: bool
    may_keep: bool


class Step:
    """What one worker has to send in a step.

    resting: names of the tensors that rest here. spoilt: of those because of which all ranks must
    undo the step, whatever their gradients are.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.stats = StepStats(norm_of_residual=kept.compensation.norm)
        self.magnitudes, self.rows = Magnitudes(), RowGradients()
        self.resting: set[str] = set()
        self.spoilt: set[str] = set()
        self._is_selected: set[str] = set()
        self._founds: dict[str, Found] = {}
        self._held: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Given]] = {}  # by bucket
        self._waiting_bytes = 0

    # ---- gradients -------------------------------------------------------------------------------

    def add(self, bucket: Bucket, given: Given) -> None:
        """Take a gradient in: with others of its bucket, if nobody else can change it meanwhile."""
        is_early = self.kept.compression.preconditioning == "early"
        if is_early or not (given.may_keep and given.is_last):
            return self._take_in(bucket, [given])
        self._waiting.setdefault(bucket.name, []).append(given)
        self._waiting_bytes += given.grad_N.nbytes
        if self._waiting_bytes >= MOST_WAITING_BYTES and given.grad_N.device.type == "cpu":
            self.take_in_waiting(bucket)

    def take_in_waiting(self, bucket: Bucket) -> None:
        """Take in what `add` has left waiting."""
        waiting = self._waiting.pop(bucket.name, [])
        if waiting:
            self._waiting_bytes -= sum(given.grad_N.nbytes for given in waiting)
            self._take_in(bucket, waiting)

    def _take_in(self, bucket: Bucket, given: Sequence[Given]) -> None:
        by_kind: dict[Any, list[Given]] = {}
        for each in given:  # of one kind, unless a person has changed the model since
            kind = each.grad_N.device, state_dtype(each.grad_N.dtype)
            by_kind.setdefault(kind, []).append(each)
        for alike in by_kind.values():
            self.accumulate(bucket, self._observed(alike))

    def _observed(self, given: Sequence[Given]) -> Sequence[Given]:
        """Feed gradients to the tensors' statistics; return what is accumulated.

        That is the gradients themselves, or, if preconditioning is early, as divided.
        """
        fed = [(each.name, each.grad_N, each.scale, each.num_parts) for each in given]
        self.kept.statistics.observe_together(fed)
        if self.kept.compression.preconditioning != "early":
            return given
        return [self._divided(each) for each in given]

    def _divided(self, given: Given) -> Given:
        grad_N = scaled(given.grad_N, given.scale)
        # Check the gradient itself: after the division an infinite entry may look finite.
        self.magnitudes.note_gradient(given.name, grad_N)
        root_N = self.kept.statistics.root(given.name)
        divided_N = grad_N if root_N is None else divide(grad_N, root_N)
        may_keep = given.may_keep and divided_N is given.grad_N
        return given._replace(grad_N=divided_N, scale=None, may_keep=may_keep)

    def hold(self, given: Given) -> None:
        """Add a gradient to what is summed within the island when the bucket is complete."""
        ((name, grad_N, scale, _, _, may_keep),) = self._observed([given])
        mine_N = scaled(grad_N, scale)
        if mine_N is grad_N and not may_keep:
            mine_N = grad_N.clone()
        # Check each gradient before the sum: two that are too large may cancel there, but this
        # worker's statistic has seen both.
        self.magnitudes.note_gradient(name, mine_N)
        held_N = self._held.get(name)
        self._held[name] = mine_N if held_N is None else held_N.add_(mine_N)

    def release(self, name: str) -> Tensor:
        """Return, and forget, what `hold` summed."""
        return self._held.pop(name)

    def accumulate(self, bucket: Bucket, given: Sequence[Given]) -> None:
        """Add gradients, or slices of an island's sums, to the residuals.

        Of a bucket that is sent sparsely, with a tensor's last gradient in the step its entries are
        selected in the same pass.
        """
        gradients = []
        if not bucket.is_sparse:
            given = [each for each in given if not self._is_kept_whole(each)]
        for name, grad_N, scale, _, is_last, may_keep in given:
            selects = bucket.is_sparse and is_last and self.kept.compression.select_by == "raw"
            gradients.append(Gradient(
                name, grad_N, scale, is_sent_whole=not bucket.is_sparse, may_keep=may_keep,
                first=bucket.firsts[name], selection=self._selection(name) if selects else None,
            ))  # fmt: skip
            if selects:
                self._is_selected.add(name)
        founds = self.kept.compensation.accumulate_together(gradients)
        for gradient, found in zip(gradients, founds, strict=True):
            self._founds[gradient.name] = found
            self.magnitudes.note(gradient.name, found.report[:1])

    def _is_kept_whole(self, given: Given) -> bool:
        """Keep what is added to no residual and divided by nothing: it is sent as it is."""
        name = given.name
        if self.kept.changes_gradients(name) or name in self.magnitudes:
            return False
        mine_N = scaled(given.grad_N, given.scale)
        mine_N = mine_N.to(state_dtype(mine_N.dtype))
        if name in self._whole:
            self._whole[name].add_(mine_N)
        else:
            is_ours = given.may_keep or mine_N.data_ptr() != given.grad_N.data_ptr()
            self._whole[name] = mine_N if is_ours else mine_N.clone()
        return True

    def take_whole(self, name: str) -> Tensor | None:
        """Return, and forget, what is sent as it is, (N,); None for a tensor that is not."""
        return self._whole.pop(name, None)

    def _selection(self, name: str) -> Selection | None:
        return self.kept.thresholds[name].begin(self.kept.compensation.num_steps)

    # ---- what they came to -----------------------------------------------------------------------

    def read(self, bucket: Bucket) -> Generator[Question, Any, Seen]:
        """Return what the passes over a bucket's tensors saw. Asks once."""
        awake = [spec for spec in bucket.specs if spec.name not in self.resting]
        compensation = self.kept.compensation
        for spec in awake:
            if spec.name not in self._is_selected and self.kept.compression.select_by == "raw":
                selection = self._selection(spec.name)
                if selection is not None:  # the last micro-batch had no gradient for this tensor
                    first = bucket.firsts[spec.name]
                    found = compensation.select_again(spec.name, selection, first)
                    self._founds[spec.name] = found
            largest = self.magnitudes[spec.name]
            if largest.data_ptr() != self._founds[spec.name].report.data_ptr():
                self._founds[spec.name].report[:1] = largest
        founds = [self._founds.pop(spec.name, None) for spec in bucket.specs]
        if not awake:
            return Seen(founds, founds, founds)
        there, counted = [f for f in founds if f is not None], self._to_count(bucket, founds)
        counts = [buffers.count_nonzero(compensation.residual[name]) for name in counted]
        parts = [buffers.join_reports(there)]
        if counts:
            parts.append(torch.stack(counts).view(torch.int32))
        answer = yield Question(parts)
        reports = iter(buffers.split_reports(there, answer[0]))
        numbers = {}
        if counts:
            found = answer[1].clone().view(torch.int64)  # a copy, for its address
            numbers = dict(zip(counted, found.tolist(), strict=True))
        return Seen(
            founds,
            [None if found is None else next(reports) for found in founds],
            [numbers.get(spec.name) for spec in bucket.specs],
        )

    def _to_count(self, bucket: Bucket, founds: Sequence[Found | None]) -> list[str]:
        """Return the tensors that will be ranked on a GPU, which is not waited for if it is known
        how many elements are not 0."""
        is_raw = self.kept.compression.select_by == "raw"
        return [
            spec.name
            for spec, found in zip(bucket.specs, founds, strict=True)
            if found is not None and is_raw and spec.device.type != "cpu"
            and self.kept.thresholds[spec.name].plan.is_exact
        ]  # fmt: skip

    def bad_tensors(self, bucket: Bucket, reports: Sequence[Report | None]) -> set[int]:
        """Return which of a bucket's tensors make all ranks undo the step, by number."""
        spoilt = {n for n, spec in enumerate(bucket.specs) if spec.name in self.spoilt}
        return spoilt | overflown(reports, bucket.dtype)

    def largest(self, specs: Sequence[TensorSpec]) -> Tensor:
        """Return the largest magnitude of each of these tensors' gradients, (T,) float32, where
        they are; nothing more is asked of the passes over them."""
        for spec in specs:
            self._founds.pop(spec.name)
        return torch.cat([self.magnitudes[spec.name] for spec in specs]).view(torch.float32)

    def wake(self, specs: Sequence[TensorSpec]) -> None:
        """Let tensors that rest here count as zero, as they do not rest on all ranks."""
        for spec in specs:
            self.resting.discard(spec.name)
            none = torch.zeros(spec.whole, dtype=spec.dtype, device=spec.device)
            self.kept.statistics.observe(spec.name, none, None, 1)

    def drop(self, name: str) -> None:
        """Forget a tensor's gradients in this step, none of which has left."""
        for part in (self.kept.compensation, self.kept.statistics, self.magnitudes, self.rows):
            part.drop(name)
        self._founds.pop(name, None)
        self._held.pop(name, None)
        self._whole.pop(name, None)
        for bucket, waiting in self._waiting.items():
            self._waiting[bucket] = [given for given in waiting if given.name != name]
        self._is_selected.discard(name)
