"""Buckets: which tensors leave together, in which order, and by which protocol.

Depends on nothing but shapes and settings, so that all ranks make the same buckets.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from dgc.compression import Compression
from dgc.selection.plan import SparsityPlan, plan_sparsity
from dgc.wire.codec import Codec
from dgc.wire.cost import Cost, Network, cheapest, dense_cost, gather_cost, sparse_all_reduce_cost
from dgc.worker.elements import TensorSpec

# Few buckets, as each costs some milliseconds of the host, and so many that the last one, which
# nothing hides, is a small part of the whole.
NUM_BUCKETS, LEAST_BYTES, MOST_BYTES = 12, 16 * 2**20, 128 * 2**20
ENTRIES_A_MESSAGE = 64  # at least, where a header is as long as some ten entries


@dataclass(frozen=True)
class Bucket:
    """Tensors that leave together. protocol: one of cost.PROTOCOLS, or `rows`.

    A bucket that is sent sparsely has a codec, and a plan a tensor. costs: what the protocols would
    cost, by name.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    protocol: str
    codec: Codec | None = None
    plans: tuple[SparsityPlan, ...] = ()
    costs: dict[str, Cost] = field(default_factory=dict, compare=False)

    @property
    def is_sparse(self) -> bool:
        return self.protocol in ("gather", "sparse_all_reduce")

    @property
    def dtype(self) -> torch.dtype:
        """Of all its elements."""
        return self.specs[0].dtype

    @functools.cached_property
    def firsts(self) -> dict[str, int]:
        """Where each tensor's positions begin in a bucket that is sent sparsely."""
        offsets = self.codec.offsets if self.is_sparse else (0,) * len(self.specs)
        return {spec.name: first for spec, first in zip(self.specs, offsets, strict=True)}

    @property
    def num_entries(self) -> int:
        """Entries that a rank aims at."""
        return sum(plan.k for plan in self.plans)


def make_buckets(
    specs: Sequence[TensorSpec],
    compression: Compression,
    density: float,
    world_size: int,
    bucket_bytes: int | None = None,
) -> list[Bucket]:
    """Group tensors into buckets of at least `bucket_bytes` of gradient, but for the last ones; of
    more where a sparse all-reduce would send many messages of few entries.

    bucket_bytes: None: so many that there are about NUM_BUCKETS, within LEAST_BYTES and MOST_BYTES.

    Tensors that may be sent sparsely and others, and those of float64, fill buckets of their own; a
    row-sparse one has a bucket to itself. Buckets are ordered by their last tensor, so that given
    tensors in the order in which backward finishes them, none waits for a later one.
    """
    if bucket_bytes is None:
        num_bytes = sum(s.numel * s.dtype.itemsize for s in specs if not s.row_size)
        bucket_bytes = min(max(LEAST_BYTES, num_bytes // NUM_BUCKETS), MOST_BYTES)
    least = _least_elements(compression, density, world_size)
    groups: list[list[TensorSpec]] = []
    filling: dict[tuple[bool, torch.device, torch.dtype], list[TensorSpec]] = {}
    for spec in specs:
        key = (spec.compressible and density < 1, spec.device, spec.dtype)
        group = [] if spec.row_size else filling.setdefault(key, [])
        group.append(spec)
        numel = sum(member.numel for member in group)
        if spec.row_size:
            groups.append(group)
        elif numel * spec.dtype.itemsize >= bucket_bytes and numel >= least:
            groups.append(filling.pop(key))
    position = {spec.name: index for index, spec in enumerate(specs)}
    groups += sorted(filling.values(), key=lambda group: position[group[-1].name])
    return [
        _plan_bucket(f"bucket{index}", tuple(group), compression, density, world_size)
        for index, group in enumerate(groups)
    ]


def _least_elements(compression: Compression, density: float, world_size: int) -> int:
    """Return from how many elements of a bucket a sparse all-reduce's headers are few beside it."""
    many = compression.protocol == "auto" and world_size > 1 + compression.merged_factor
    if density >= 1 or not (many or compression.protocol == "sparse_all_reduce"):
        return 0
    return math.ceil(ENTRIES_A_MESSAGE * world_size / density)


def _plan_bucket(
    name: str,
    specs: tuple[TensorSpec, ...],
    compression: Compression,
    density: float,
    world_size: int,
) -> Bucket:
    names, dtype = tuple(spec.name for spec in specs), specs[0].dtype
    if specs[0].row_size:
        (spec,) = specs
        codec = Codec(names, (spec.whole // spec.row_size,), dim=spec.row_size, dtype=dtype,
                      value_dtype="float32", index_coding=compression.index_coding)  # fmt: skip
        return Bucket(f"{name}.rows", specs, "rows", codec)
    numel = sum(spec.numel for spec in specs)
    network = Network(compression.link_latency_us, compression.link_gbit_per_s)
    costs = {"dense": dense_cost(numel, world_size, network, dtype.itemsize)}
    if density >= 1 or not specs[0].compressible:
        return Bucket(f"{name}.dense", specs, "dense", costs=costs)
    plans = tuple(
        plan_sparsity(
            spec.numel, density, k_tolerance=compression.k_tolerance,
            exact_below=compression.exact_below,
        )
        for spec in specs
    )  # fmt: skip
    codec = _codec(specs, compression)
    num_entries = sum(plan.k for plan in plans)
    costs["gather"] = gather_cost(codec.message_bytes(num_entries), world_size, network)
    costs["sparse_all_reduce"] = sparse_all_reduce_cost(
        numel, num_entries, compression.merged_factor, codec.of_owner(0, world_size).message_bytes,
        world_size, network,
    )  # fmt: skip
    protocol = compression.protocol
    if protocol == "auto":
        protocol = "gather" if world_size == 1 else cheapest(costs)
    if protocol == "dense":
        return Bucket(f"{name}.dense", specs, "dense", costs=costs)
    return Bucket(f"{name}.{protocol}", specs, protocol, codec, plans, costs)


def move_to_rows(
    buckets: Sequence[Bucket],
    row_specs: Sequence[TensorSpec],
    compression: Compression,
    world_size: int,
) -> list[Bucket]:
    """Return the buckets without these tensors, and a bucket of rows for each behind them.

    What stays in a bucket goes the way it would have gone.
    """
    names = {spec.name for spec in row_specs}
    kept = []
    for bucket in buckets:
        stay = [n for n, spec in enumerate(bucket.specs) if spec.name not in names]
        if len(stay) == len(bucket.specs):
            kept.append(bucket)
        elif stay:
            specs = tuple(bucket.specs[n] for n in stay)
            codec = bucket.codec and _codec(specs, compression)
            plans = tuple(bucket.plans[n] for n in stay if bucket.plans)
            kept.append(replace(bucket, specs=specs, codec=codec, plans=plans, costs={}))
    return kept + [
        _plan_bucket(f"bucket{len(buckets) + n}", (spec,), compression, 1.0, world_size)
        for n, spec in enumerate(row_specs)
    ]


def _codec(specs: tuple[TensorSpec, ...], compression: Compression) -> Codec:
    return Codec(
        tuple(spec.name for spec in specs), tuple(spec.numel for spec in specs),
        value_dtype=compression.value_dtype, index_coding=compression.index_coding,
        dtype=specs[0].dtype,
    )  # fmt: skip


def explain(buckets: Sequence[Bucket], world_size: int) -> str:
    """Return a table of what leaves how, and of what the cost model says of each way."""
    lines = [
        f"{'bucket':30} {'tensors':>7} {'elements':>12} {'entries':>9}  way, and bytes sent / ms"
    ]
    for bucket in buckets:
        ways = "  ".join(
            f"{'*' if name == bucket.protocol else ''}{name} "
            f"{cost.num_bytes:,.0f} / {1e3 * cost.seconds:.2f}"
            for name, cost in bucket.costs.items()
        )
        elements = sum(spec.numel for spec in bucket.specs)
        lines.append(
            f"{bucket.name:30} {len(bucket.specs):7} {elements:12,} {bucket.num_entries:9,}  "
            f"{ways or 'rows as they come'}"
        )
    return "\n".join([f"{world_size} ranks exchange; * is taken", *lines])
