"""The exchange: gradients in as they come, what the ranks agreed on out, or nothing of a bad step.

Owns: one collective a bucket, the fixed order of buckets, the merge in rank order, and the verdict:
a step in which any rank's gradient was infinite or NaN is undone on all, to the bit.
Shapes: N elements of one flattened tensor, K selected of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from dgc.buckets import DENSE_BYTES, Bucket, TensorSpec, plan_buckets
from dgc.comm import Comm, Handle
from dgc.compensate import Compensation
from dgc.compression import Compression
from dgc.precondition import Statistics, divide
from dgc.sparsify import SparseGrad, SparsityPlan, select_largest
from dgc.stats import StepStats
from kernels import buffers

# What is larger counts as infinite: sums of such squares would soon be, and spoil a statistic.
LARGEST_GRADIENT = 2.0**40


@dataclass
class Update:
    """What the ranks agreed on, by tensor: means (N,), or some entries of them."""

    dense: dict[str, Tensor] = field(default_factory=dict)
    sparse: dict[str, SparseGrad] = field(default_factory=dict)


class Exchange:
    """One worker's side of the exchange.

    A step is: `add` for every gradient of every tensor, `close` for every tensor, in any order,
    then `finish`. A bucket leaves when its last tensor is closed and all buckets before it have
    left, so every rank starts them in one order.
    """

    def __init__(
        self,
        comm: Comm,
        compression: Compression,
        compensation: Compensation,
        statistics: Statistics,
        seed: int,
    ) -> None:
        self.comm, self.compression = comm, compression
        self.compensation, self.statistics = compensation, statistics
        self.buckets: list[Bucket] = []
        self.stats = StepStats()
        self._seed = seed
        self._scope = comm.unique_name("exchange")  # two optimizers' buckets must not be confused
        self._bucket_of: dict[str, Bucket] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._reset()

    def plan(self, specs: Sequence[TensorSpec], density: float, bucket_bytes: int) -> None:
        """Lay out the buckets for a density. Between steps only; on all ranks alike."""
        if self.is_under_way:
            raise RuntimeError("the density can change only between steps; finish this one first")
        self.buckets = plan_buckets(
            specs, self.compression, density, self.comm.world_size, bucket_bytes
        )
        self._bucket_of = {spec.name: bucket for bucket in self.buckets for spec in bucket.specs}
        self._specs = {spec.name: spec for spec in specs}

    @property
    def is_under_way(self) -> bool:
        return bool(self._largest)

    # ---- out -------------------------------------------------------------------------------------

    def add(
        self, name: str, grad_N: Tensor, scale: Tensor | None = None, num_parts: int = 1
    ) -> None:
        """Take one of the `num_parts` gradients of a tensor in this step, times scale (1,)."""
        if not self.is_under_way:
            self._begin()
        with self.stats.timed("compensate"):
            self.statistics.observe(name, grad_N, scale, num_parts)
            if self.compression.preconditioning == "early":
                grad_N, scale = self._divide_early(name, grad_N, scale), None
            is_whole = not self._bucket_of[name].is_sparse
            largest = self.compensation.accumulate(
                name, grad_N, scale=scale, is_sent_whole=is_whole
            )
            self._note_largest(name, largest)

    def _divide_early(self, name: str, grad_N: Tensor, scale: Tensor | None) -> Tensor:
        grad_N = grad_N.float() if scale is None else grad_N * scale
        self._note_largest(name, grad_N.abs().amax().view(1))  # a quotient can hide an infinity
        root_N = self.statistics.root(name)
        return grad_N if root_N is None else divide(grad_N, root_N)

    def _note_largest(self, name: str, largest: Tensor) -> None:
        before = self._largest.get(name)
        self._largest[name] = largest if before is None else torch.maximum(before, largest)

    def close(self, name: str) -> None:
        """Take no more gradients of a tensor in this step; start what can now be sent."""
        if name in self._closed:
            raise RuntimeError(f"{name} has already given its gradient in this step")
        if name not in self._largest:
            spec = self._specs[name]
            self.add(name, torch.zeros(spec.numel, device=spec.device))
        self._closed.add(name)
        self._start_ready_buckets()

    def open_names(self) -> list[str]:
        """Names of the tensors that are not closed in this step."""
        return [name for name in self._bucket_of if name not in self._closed]

    def _begin(self) -> None:
        self.stats = StepStats()
        step = self.compensation.num_steps
        for device in {spec.device for spec in self._specs.values()}:
            seed = (self._seed + self.comm.rank) * 1_000_003 + step
            self._generators[device] = Generator(device).manual_seed(seed)

    def _reset(self) -> None:
        self._largest: dict[str, Tensor] = {}
        self._closed: set[str] = set()
        self._started: list[tuple[Bucket, Handle]] = []
        self._generators: dict[torch.device, Generator] = {}

    def _start_ready_buckets(self) -> None:
        for bucket in self.buckets[len(self._started) :]:
            if not all(spec.name in self._closed for spec in bucket.specs):
                return
            start = self._start_sparse if bucket.is_sparse else self._start_dense
            self._started.append((bucket, start(bucket, self._overflown(bucket))))

    def _overflown(self, bucket: Bucket) -> set[str]:
        """Return the tensors whose gradient cannot be used. On a GPU this waits for them."""
        largest = torch.cat([self._largest[spec.name] for spec in bucket.specs]).tolist()
        pairs = zip(bucket.specs, largest, strict=True)
        return {spec.name for spec, value in pairs if not value <= LARGEST_GRADIENT}

    def _start_dense(self, bucket: Bucket, overflown: set[str]) -> Handle:
        with self.stats.timed("pack"):
            parts = []
            for spec in bucket.specs:
                values_N = self.compensation.drain(spec.name)
                root_N = self._late_root(spec.name)
                if spec.name in overflown:
                    values_N = torch.full_like(values_N, float("nan"))
                parts.append(values_N if root_N is None else divide(values_N, root_N))
            flat = torch.cat(parts)
            self.stats.dense_bytes += flat.numel() * DENSE_BYTES
        return self.comm.all_reduce_async(flat, f"{self._scope}.{bucket.name}")

    def _late_root(self, name: str, indices_K: Tensor | None = None) -> Tensor | None:
        """Return what entries are divided by before they leave; None if they are not."""
        is_late = self.compression.preconditioning == "late"
        return self.statistics.root(name, indices_K) if is_late else None

    def _start_sparse(self, bucket: Bucket, overflown: set[str]) -> Handle:
        with self.stats.timed("select"):
            grads = [
                None if spec.name in overflown else self._take_largest(spec, plan, bucket)
                for spec, plan in zip(bucket.specs, bucket.plans, strict=True)
            ]
        with self.stats.timed("pack"):
            message = bucket.codec.encode(grads)
            self.stats.sparse_bytes += message.numel()
        message = message.to(bucket.specs[0].device)
        return self.comm.all_gather_async(message, f"{self._scope}.{bucket.name}")

    def _take_largest(self, spec: TensorSpec, plan: SparsityPlan, bucket: Bucket) -> SparseGrad:
        """Move the largest entries out of the residual, as the receivers will decode them."""
        residual = self.compensation.residual[spec.name]
        ranked = residual
        if self.compression.select_by == "preconditioned":
            root_N = self.statistics.root(spec.name)
            ranked = residual if root_N is None else divide(buffers.decode(residual), root_N)
        indices_K = select_largest(ranked, plan, generator=self._generators[spec.device])
        root_K = self._late_root(spec.name, indices_K)
        if root_K is not None and not root_K.all():  # of squares that underflow: not yet sendable
            indices_K, root_K = indices_K[root_K > 0], root_K[root_K > 0]
        values_K = buffers.take(residual, indices_K)
        divided_K = values_K if root_K is None else divide(values_K, root_K)
        sent_K = bucket.codec.round_values(divided_K)
        lost_K = None
        if sent_K is not divided_K:  # what rounding takes off, in the residual's own units
            back_K = sent_K if root_K is None else sent_K * root_K
            lost_K = torch.where(sent_K == divided_K, torch.zeros_like(back_K), values_K - back_K)
        self.compensation.remove_sent(spec.name, indices_K, lost_K)
        self.stats.num_selected += indices_K.numel()
        self.stats.num_selectable += spec.numel
        return SparseGrad(sent_K, indices_K, spec.numel)

    # ---- in --------------------------------------------------------------------------------------

    def finish(self) -> Update | None:
        """Wait for the buckets in order and return what to apply; None if the step was undone."""
        update, bad = Update(), []
        sharing = self._start_sharing()
        for bucket, handle in self._started:
            with self.stats.timed("wait"):
                arrived = handle.wait()
            with self.stats.timed("merge"):
                merge = self._merge_sparse if bucket.is_sparse else self._merge_dense
                bad += merge(bucket, arrived, update)
        if sharing is not None:
            names, handle = sharing
            mean = handle.wait().div_(self.comm.world_size)
            if not bad:
                self.statistics.unpack(names, mean)
        if bad:
            self.stats.skipped = ", ".join(bad)
        for part in (self.compensation, self.statistics):
            part.roll_back() if bad else part.commit()
        self._reset()
        return None if bad else update

    def _merge_dense(self, bucket: Bucket, arrived: Tensor, update: Update) -> list[str]:
        mean = arrived.div_(self.comm.world_size)
        sizes = [spec.numel for spec in bucket.specs]
        means = mean.split(sizes)
        if not torch.isfinite(mean).all():
            names = [spec.name for spec in bucket.specs]
            pairs = zip(names, means, strict=True)
            return [n for n, part in pairs if not torch.isfinite(part).all()] or names
        for spec, mean_N in zip(bucket.specs, means, strict=True):
            scale = self.compression.update_scale if spec.compressible else 1.0
            update.dense[spec.name] = mean_N if scale == 1 else mean_N.mul_(scale)
        return []

    def _merge_sparse(self, bucket: Bucket, arrived: Tensor, update: Update) -> list[str]:
        ranks = bucket.codec.decode(arrived, self.comm.world_size)
        bad = [
            f"{spec.name} (rank {rank})"
            for rank, grads in enumerate(ranks)
            for spec, grad in zip(bucket.specs, grads, strict=True)
            if grad is None
        ]
        if bad:
            return bad
        for spec, *grads in zip(bucket.specs, *ranks, strict=True):
            merged = merge_in_rank_order(grads)
            if self.compression.update_scale != 1:
                merged.values.mul_(self.compression.update_scale)
            update.sparse[spec.name] = merged
        return []

    def _start_sharing(self) -> tuple[list[str], Handle] | None:
        """Start to average those statistics whose turn it is; return their names."""
        names = self.statistics.due(self.compensation.num_steps)
        if not names:
            return None
        flat = self.statistics.pack(names)
        self.stats.dense_bytes += flat.nbytes
        return names, self.comm.all_reduce_async(flat, f"{self._scope}.statistics")

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, velocities and statistics; not the replica's."""
        return {
            "compensation": self.compensation.state_dict(),
            "statistics": self.statistics.state_dict(),
        }

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of `state_dict` by kind: residual, velocity, statistics."""
        return {**self.compensation.num_bytes(), "statistics": self.statistics.num_bytes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        devices = {name: spec.device for name, spec in self._specs.items()}
        numels = {name: spec.numel for name, spec in self._specs.items()}
        statistics = state.get("statistics", {})
        self.statistics.check(statistics)
        self.compensation.load_state_dict(state["compensation"], devices, numels)
        self.statistics.load_state_dict(statistics)


def merge_in_rank_order(grads: Sequence[SparseGrad]) -> SparseGrad:
    """Return the mean of tensors that are 0 but for some entries: the same bits on every rank.

    Entries of one index are summed in rank order. Never as large as the tensor.
    Example: {2: 1.0, 5: 3.0} and {5: 1.0} -> {2: 0.5, 5: 2.0}.
    """
    indices_K = torch.cat([grad.indices for grad in grads]).unique()
    sums_K = torch.zeros(indices_K.numel(), device=indices_K.device)
    for grad in grads:  # a rank's indices are unique
        sums_K[torch.searchsorted(indices_K, grad.indices)] += grad.values
    return SparseGrad(sums_K.div_(len(grads)), indices_K, grads[0].numel)
