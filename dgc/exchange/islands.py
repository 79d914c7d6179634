"""What the ranks of an island do for each other before and after they exchange with other islands.

An island is the ranks that sum densely among themselves, in two levels; topology.py chooses it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.wire.buckets import Bucket
from dgc.worker.magnitudes import is_finite

if TYPE_CHECKING:
    from dgc.exchange.exchange import Exchange


def pass_on(exchange: Exchange, bucket: Bucket, arrived: Tensor) -> Generator[Handle, Any, Tensor]:
    """Join what arrived at the ranks of the island, in their order; in one level, nothing more."""
    if exchange.island is None:
        return arrived
    exchange.stats.island_bytes += arrived.nbytes
    return (yield exchange.island.all_gather_async(arrived, exchange.name_of(bucket, "pass")))


def awake_flags(exchange: Exchange, bucket: Bucket) -> Tensor:
    """Return 1 for each of a bucket's tensors, 0 for one that rests: sums tell whether all do."""
    flags = torch.ones(len(bucket.specs), dtype=bucket.dtype, device=bucket.specs[0].device)
    for place, spec in enumerate(bucket.specs if exchange.resting else ()):
        if spec.name in exchange.resting:
            flags[place] = 0
    return flags


def names_at_rest(exchange: Exchange, bucket: Bucket, sums: Tensor) -> set[str]:
    """Return those tensors that rest on all the ranks whose flags were summed.

    Waits for a GPU only where some rest here: else none rests everywhere.
    """
    mine = [n for n, spec in enumerate(bucket.specs) if spec.name in exchange.resting]
    counts = sums.tolist() if mine else []
    return {bucket.specs[n].name for n in mine if counts[n] == 0}


def sum_within(exchange: Exchange, bucket: Bucket) -> Generator[Handle, Any, None]:
    """Sum the ranks' gradients; add this rank's shares of the sums to its residuals.

    What divides a share must know all gradients in it: statistics are averaged in the island, too.
    """
    island = exchange.island
    with exchange.stats.timed("pack"):
        sizes = [spec.numel for spec in bucket.specs]
        num_tensors, device = len(sizes), bucket.specs[0].device
        shape = (island.world_size, sum(sizes) + num_tensors)
        rows = torch.zeros(shape, dtype=bucket.dtype, device=device)
        *parts, flags = rows.split([*sizes, num_tensors], dim=1)
        flags[:] = awake_flags(exchange, bucket)
        for spec, part in zip(bucket.specs, parts, strict=True):
            if spec.name in exchange.resting:
                continue
            held_N = exchange.release(spec.name)
            whole_rows, rest = divmod(held_N.numel(), spec.numel)
            part[:whole_rows] = held_N[: whole_rows * spec.numel].view(whole_rows, -1)
            if rest:
                part[whole_rows, :rest] = held_N[-rest:]
        exchange.stats.island_bytes += rows.nbytes
    mine = yield island.reduce_scatter_async(rows, exchange.name_of(bucket, "sum"))
    *shares, flags = mine.split([*sizes, num_tensors])
    exchange.wake_all_but(bucket, names_at_rest(exchange, bucket, flags))
    names = exchange.statistics.shareable(spec.name for spec in bucket.specs)
    if names and exchange.compression.preconditioning == "late":
        means = []
        for flat in exchange.statistics.pack(names):
            exchange.stats.island_bytes += flat.nbytes
            stage = f"statistics.{len(means)}"
            mean = yield island.all_reduce_async(flat, exchange.name_of(bucket, stage))
            means.append(mean.div_(island.world_size))
        exchange.statistics.unpack(names, means)
        if not all(map(is_finite, means)):  # of one rank's gradient, which was not
            exchange.magnitudes.spoil(names, means[0].device)
    with exchange.stats.timed("compensate"):
        for spec, share_N in zip(bucket.specs, shares, strict=True):
            if spec.name in exchange.resting:
                continue
            exchange.accumulate(spec.name, share_N.clone(), may_keep=True)
