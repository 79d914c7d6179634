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
from dgc.worker.rows import RowGradients
from dgc.worker.scaling import scaled
from dgc.worker.statistics import divide
from dgc.worker.stats import StepStats
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report


class Seen(NamedTuple):
    """What the passes over a bucket's tensors saw, by number; None for those that rest.

    counts: of the residual, how many elements are not 0; None where that was not counted.
    """

    founds: list[Found | None]
    reports: list[Report | None]
    counts: list[int | None]


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

    def observe(
        self, name: str, grad_N: Tensor, scale: Tensor | None, num_parts: int
    ) -> tuple[Tensor, Tensor | None]:
        """Feed a gradient to the tensor's statistic; return what is accumulated, and its scale.

        That is the gradient itself, or, if preconditioning is early, the gradient as divided.
        """
        self.kept.statistics.observe(name, grad_N, scale, num_parts)
        if self.kept.compression.preconditioning != "early":
            return grad_N, scale
        grad_N = scaled(grad_N, scale)
        # Check the gradient itself: after the division an infinite entry may look finite.
        self.magnitudes.note_gradient(name, grad_N)
        root_N = self.kept.statistics.root(name)
        return (grad_N if root_N is None else divide(grad_N, root_N)), None

    def hold(self, name: str, grad_N: Tensor, scale: Tensor | None, may_keep: bool) -> None:
        """Add a gradient to what is summed within the island when the bucket is complete."""
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

    def accumulate(
        self,
        name: str,
        grad_N: Tensor,
        *,
        is_sparse: bool,
        scale: Tensor | None = None,
        is_last: bool = True,
        may_keep: bool = False,
    ) -> None:
        """Add a gradient, or a slice of an island's sum, to the residual.

        is_sparse: the tensor is sent sparsely: with the step's last gradient (is_last) its entries
            are selected in the same pass.
        """
        compensation, selection = self.kept.compensation, None
        if is_sparse and is_last and self.kept.compression.select_by == "raw":
            selection = self.kept.thresholds[name].begin(compensation.num_steps)
            self._is_selected.add(name)
        found = compensation.accumulate(
            name, grad_N, scale=scale, is_sent_whole=not is_sparse, selection=selection,
            may_keep=may_keep,
        )  # fmt: skip
        self._founds[name] = found
        self.magnitudes.note(name, found.report[:1])

    def read(self, bucket: Bucket) -> Generator[Question, Any, Seen]:
        """Return what the passes over a bucket's tensors saw. Asks once."""
        awake = [spec for spec in bucket.specs if spec.name not in self.resting]
        compensation = self.kept.compensation
        for spec in awake:
            if spec.name not in self._is_selected and self.kept.compression.select_by == "raw":
                selection = self.kept.thresholds[spec.name].begin(compensation.num_steps)
                if selection is not None:  # the last micro-batch had no gradient for this tensor
                    self._founds[spec.name] = compensation.select_again(spec.name, selection)
            self._founds[spec.name].report[:1] = self.magnitudes[spec.name]
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
        self._is_selected.discard(name)
