"""Buckets: which tensors leave together, in which order, and whether sparsely or densely.

Depends on nothing but shapes and settings, so that all ranks plan the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgc.codec import Codec
from dgc.compression import Compression
from dgc.sparsify import SparsityPlan, plan_sparsity

DENSE_BYTES = 4  # an all-reduce is float32, whatever the parameters are


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


def dense_is_cheaper(numel: int, k: int, entry_bytes: int, world_size: int) -> bool:
    """Tell whether an all-reduce of float32 moves no more bytes than a gather of k entries.

    On a ring of P ranks, each sends 2 (P - 1) / P * 4 numel bytes in the one and
    (P - 1) k entry_bytes in the other. (PEERS.md, finding 2.)
    Example: numel=1000, entries of 8 bytes -> 4 ranks: dense from k=250; 2 ranks: from k=500.
    """
    return 2 * DENSE_BYTES * numel <= world_size * k * entry_bytes


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
        if sum(member.numel for member in group) * DENSE_BYTES >= bucket_bytes:
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
