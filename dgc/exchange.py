"""Buckets: what leaves together, in which order, sparse or dense; and what comes back.

Owns: the choice between a sparse gather and a dense all-reduce, one collective a bucket, the fixed
order of buckets, the merge in rank order. Refuses gradients that are not finite.
Shapes: N elements of one flattened tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from dgc.codec import Codec
from dgc.comm import Comm, Handle
from dgc.compensate import Compensation
from dgc.compression import Compression
from dgc.sparsify import SparseGrad, SparsityPlan, plan_sparsity, select_largest

_DENSE_BYTES = 4  # an all-reduce is float32, whatever the parameters are


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to exchange. `compressible`: it may be sent sparsely."""

    name: str
    numel: int
    device: torch.device
    compressible: bool


@dataclass(frozen=True)
class Bucket:
    """Tensors that leave in one collective. A sparse bucket has a codec and a plan a tensor."""

    name: str
    specs: tuple[TensorSpec, ...]
    codec: Codec | None = None
    plans: tuple[SparsityPlan, ...] = ()

    @property
    def is_sparse(self) -> bool:
        return self.codec is not None


@dataclass
class StepStats:
    """What this rank's part of the last exchange came to."""

    sparse_bytes: int = 0
    dense_bytes: int = 0
    num_selected: int = 0
    num_selectable: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes handed to the collectives: messages and dense buffers, each counted once."""
        return self.sparse_bytes + self.dense_bytes

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to a phase. On a GPU: of its launch, not of its run."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def dense_is_cheaper(numel: int, k: int, entry_bytes: int, world_size: int) -> bool:
    """Tell whether an all-reduce of float32 moves no more bytes than a gather of k entries.

    On a ring of P ranks, each sends 2 (P - 1) / P * 4 numel bytes in the one and
    (P - 1) k entry_bytes in the other. (PEERS.md, finding 2.)
    Example: numel=1000, entries of 8 bytes -> 4 ranks: dense from k=250; 2 ranks: from k=500.
    """
    return 2 * _DENSE_BYTES * numel <= world_size * k * entry_bytes


def plan_buckets(
    specs: Sequence[TensorSpec],
    compression: Compression,
    density: float,
    world_size: int,
    bucket_bytes: int,
) -> list[Bucket]:
    """Group tensors into buckets of at least `bucket_bytes` of gradient, but for the last ones.

    Sparse and dense tensors fill buckets of their own. Buckets are ordered by their last tensor,
    so that given tensors in the order in which backward finishes them, none waits for a later one.
    Depends on nothing but its arguments: all ranks plan the same.
    """
    plans = {spec.name: _plan_tensor(spec, compression, density, world_size) for spec in specs}
    groups: list[list[TensorSpec]] = []
    filling: dict[tuple[bool, torch.device], list[TensorSpec]] = {}
    for spec in specs:
        key = (plans[spec.name] is not None, spec.device)
        group = filling.setdefault(key, [])
        group.append(spec)
        if sum(member.numel for member in group) * _DENSE_BYTES >= bucket_bytes:
            groups.append(filling.pop(key))
    position = {spec.name: place for place, spec in enumerate(specs)}
    groups += sorted(filling.values(), key=lambda group: position[group[-1].name])
    return [
        _make_bucket(f"bucket{index}", group, plans, compression)
        for index, group in enumerate(groups)
    ]


def _plan_tensor(
    spec: TensorSpec, compression: Compression, density: float, world_size: int
) -> SparsityPlan | None:
    """Return how to select from a tensor, or None if it is to be sent densely."""
    if not spec.compressible or density >= 1:
        return None
    plan = plan_sparsity(
        spec.numel,
        density,
        sample_ratio=compression.sample_ratio,
        k_tolerance=compression.k_tolerance,
        max_adaptations=compression.max_adaptations,
    )
    if dense_is_cheaper(spec.numel, plan.k, compression.entry_bytes, world_size):
        return None
    return plan


def _make_bucket(
    name: str,
    specs: list[TensorSpec],
    plans: dict[str, SparsityPlan | None],
    compression: Compression,
) -> Bucket:
    chosen = tuple(plan for spec in specs if (plan := plans[spec.name]) is not None)
    if not chosen:
        return Bucket(f"{name}.dense", tuple(specs))
    names, numels = tuple(spec.name for spec in specs), tuple(spec.numel for spec in specs)
    codec = Codec(names, numels, compression.value_dtype, compression.index_dtype)
    return Bucket(f"{name}.sparse", tuple(specs), codec, chosen)


class Exchange:
    """One worker's side of the exchange: gradients in as they come, agreed means out.

    A step is: `add` for every tensor, in any order, then `finish`. A bucket leaves when its last
    tensor has come and all buckets before it have left, so every rank starts them in one order.
    """

    def __init__(
        self, comm: Comm, compression: Compression, compensation: Compensation, seed: int
    ) -> None:
        self.comm, self.compression, self.compensation = comm, compression, compensation
        self.buckets: list[Bucket] = []
        self.stats = StepStats()
        self._seed = seed
        self._scope = comm.unique_name("exchange")  # two optimizers' buckets must not be confused
        self._generators: dict[torch.device, Generator] = {}
        self._bucket_of: dict[str, Bucket] = {}
        self._reset()

    def plan(self, specs: Sequence[TensorSpec], density: float, bucket_bytes: int) -> None:
        """Lay out the buckets for a density. Between steps only; on all ranks alike."""
        if self.is_under_way:
            raise RuntimeError("the density can change only between steps; finish this one first")
        self.buckets = plan_buckets(
            specs, self.compression, density, self.comm.world_size, bucket_bytes
        )
        self._bucket_of = {spec.name: bucket for bucket in self.buckets for spec in bucket.specs}
        for device in {spec.device for spec in specs} - self._generators.keys():
            self._generators[device] = Generator(device).manual_seed(self._seed + self.comm.rank)

    @property
    def is_under_way(self) -> bool:
        return bool(self._ready)

    def add(self, name: str, grad_N: Tensor) -> None:
        """Take a tensor's gradient of this step; start what can now be sent."""
        if name in self._ready:
            raise RuntimeError(f"{name} has already given its gradient in this step")
        if not self._ready:
            self.stats = StepStats()
        with self.stats.timed("compensate"):
            grad_N = grad_N.float()
            self._largest[name] = torch.linalg.vector_norm(grad_N, float("inf"))
            compensate = self.compensation
            if self._bucket_of[name].is_sparse:
                self._ready[name] = compensate.accumulate(name, grad_N)
            else:
                self._ready[name] = compensate.drain(name, grad_N)
        self._start_ready_buckets()

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """Wait for the buckets in order; yield each tensor's mean over ranks, (N,) float32."""
        for bucket, handle in self._started:
            with self.stats.timed("wait"):
                arrived = handle.wait()
            with self.stats.timed("merge"):
                means = list(self._merge(bucket, arrived))
            yield from means
        self._reset()

    def missing(self) -> list[str]:
        """Names of the tensors that have not come in this step."""
        return [name for name in self._bucket_of if name not in self._ready]

    def _reset(self) -> None:
        self._ready: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}
        self._started: list[tuple[Bucket, Handle]] = []

    def _start_ready_buckets(self) -> None:
        for bucket in self.buckets[len(self._started) :]:
            if not all(spec.name in self._ready for spec in bucket.specs):
                return
            self._check_finite(bucket)
            start = self._start_sparse if bucket.is_sparse else self._start_dense
            self._started.append((bucket, start(bucket)))

    def _check_finite(self, bucket: Bucket) -> None:
        largest = torch.stack([self._largest[spec.name] for spec in bucket.specs])
        if not torch.isfinite(largest).all():
            finite = torch.isfinite(largest).tolist()
            bad = [spec.name for spec, ok in zip(bucket.specs, finite, strict=True) if not ok]
            raise FloatingPointError(
                f"rank {self.comm.rank}: the gradient of {', '.join(bad)} has infinite or NaN "
                f"entries; lower the learning rate, lengthen its warm-up or clip (dgc.clip_norm)"
            )

    def _start_dense(self, bucket: Bucket) -> Handle:
        with self.stats.timed("pack"):
            flat = torch.cat([self._ready[spec.name] for spec in bucket.specs])
            self.stats.dense_bytes += flat.numel() * _DENSE_BYTES
        return self.comm.all_reduce_async(flat, f"{self._scope}.{bucket.name}")

    def _start_sparse(self, bucket: Bucket) -> Handle:
        with self.stats.timed("select"):
            pairs = zip(bucket.specs, bucket.plans, strict=True)
            grads = [self._take_largest(spec, plan, bucket.codec) for spec, plan in pairs]
        with self.stats.timed("pack"):
            message = bucket.codec.encode(grads)
            self.stats.sparse_bytes += message.numel()
        return self.comm.all_gather_async(message, f"{self._scope}.{bucket.name}")

    def _take_largest(self, spec: TensorSpec, plan: SparsityPlan, codec: Codec) -> SparseGrad:
        """Move the largest entries out of the residual, as the receivers will decode them."""
        residual_N = self._ready[spec.name]
        generator = self._generators[spec.device]
        indices_K = select_largest(residual_N, plan, generator=generator)
        sent_K = codec.round_values(residual_N[indices_K])
        self.compensation.remove_sent(spec.name, indices_K, sent_K)
        self.stats.num_selected += indices_K.numel()
        self.stats.num_selectable += spec.numel
        return SparseGrad(sent_K, indices_K, spec.numel)

    def _merge(self, bucket: Bucket, arrived: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Turn what arrived into means, summing in rank order: the same bits on every rank."""
        names, numels = [s.name for s in bucket.specs], [s.numel for s in bucket.specs]
        world_size = self.comm.world_size
        if not bucket.is_sparse:
            yield from zip(names, arrived.div_(world_size).split(numels), strict=True)
            return
        ranks = bucket.codec.decode(arrived, world_size)
        for name, grads in zip(names, zip(*ranks, strict=True), strict=True):
            mean_N = arrived.new_zeros(grads[0].numel, dtype=torch.float32)
            for grad in grads:
                mean_N[grad.indices] += grad.values  # a rank's indices are unique
            yield name, mean_N.div_(world_size)

    def state_dict(self) -> dict:
        """This rank's residuals, velocities and random states; not the replica's."""
        generators = {d.type: generator.get_state() for d, generator in self._generators.items()}
        return {"compensation": self.compensation.state_dict(), "generators": generators}

    def load_state_dict(self, state: dict) -> None:
        devices = {s.name: s.device for bucket in self.buckets for s in bucket.specs}
        self.compensation.load_state_dict(state["compensation"], devices)
        for device, generator in self._generators.items():
            if device.type in state["generators"]:  # else it was saved on another kind of device
                generator.set_state(state["generators"][device.type])
