"""What the ranks of an island do for each other before and after they exchange with other islands.

An island is the ranks that sum densely among themselves, in two levels; see dgc/comm/topology.py.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.exchange.question import Question
from dgc.exchange.route import Route
from dgc.exchange.step import Given, Step
from dgc.wire.buckets import Bucket


def pass_on(
    route: Route, step: Step, bucket: Bucket, arrived: Tensor
) -> Generator[Handle, Any, Tensor]:
    """Join what arrived at the ranks of the island, in their order; in one level, nothing more."""
    if route.island is None:
        return arrived
    step.stats.island_bytes += arrived.nbytes
    return (yield route.island.all_gather_async(arrived, route.name(bucket, "pass")))


def awake_flags(step: Step, bucket: Bucket) -> Tensor:
    """Return 1 for each of a bucket's tensors, 0 for one that rests: sums tell whether all do."""
    flags = torch.ones(len(bucket.specs), dtype=bucket.dtype, device=bucket.specs[0].device)
    for number, spec in enumerate(bucket.specs if step.resting else ()):
        if spec.name in step.resting:
            flags[number] = 0
    return flags


def names_at_rest(step: Step, bucket: Bucket, sums: Tensor) -> Generator[Question, Any, set[str]]:
    """Return those tensors that rest on all the ranks whose flags were summed.

    Asks only where some rest here: else none rests everywhere.
    """
    mine = [n for n, spec in enumerate(bucket.specs) if spec.name in step.resting]
    if not mine:
        return set()
    (counts,) = yield Question([sums])
    return {bucket.specs[n].name for n in mine if counts[n] == 0}


def sum_within(route: Route, step: Step, bucket: Bucket) -> Generator[Handle | Question, Any, None]:
    """Sum the ranks' gradients; add this rank's slices of the sums to its residuals."""
    sizes = [spec.numel for spec in bucket.specs]
    with step.stats.timed("pack"):
        rows = _slices(route, step, bucket, sizes)
        step.stats.island_bytes += rows.nbytes
    mine = yield route.island.reduce_scatter_async(rows, route.name(bucket, "sum"))
    *slices, flags = mine.split([*sizes, len(sizes)])
    resting = yield from names_at_rest(step, bucket, flags)
    step.wake([s for s in bucket.specs if s.name in step.resting and s.name not in resting])
    yield from _average_statistics(route, step, bucket)
    with step.stats.timed("compensate"):
        step.accumulate(bucket, [
            Given(spec.name, slice_N.clone(), None, 1, is_last=True, may_keep=True)
            for spec, slice_N in zip(bucket.specs, slices, strict=True)
            if spec.name not in step.resting
        ])  # fmt: skip


def _slices(route: Route, step: Step, bucket: Bucket, sizes: list[int]) -> Tensor:
    """Return this rank's gradients, a row for each rank of the island: its slices, and flags."""
    shape = (route.num_slices, sum(sizes) + len(sizes))
    rows = torch.zeros(shape, dtype=bucket.dtype, device=bucket.specs[0].device)
    *parts, flags = rows.split([*sizes, len(sizes)], dim=1)
    flags[:] = awake_flags(step, bucket)
    for spec, part in zip(bucket.specs, parts, strict=True):
        if spec.name in step.resting:
            continue
        held_N = step.release(spec.name)
        whole_rows, rest = divmod(held_N.numel(), spec.numel)
        part[:whole_rows] = held_N[: whole_rows * spec.numel].view(whole_rows, -1)
        if rest:
            part[whole_rows, :rest] = held_N[-rest:]
    return rows


def _average_statistics(route: Route, step: Step, bucket: Bucket) -> Generator[Handle, Any, None]:
    """Let the statistics by which slices are divided know the gradients of all of the island."""
    names = step.kept.statistics.shareable(spec.name for spec in bucket.specs)
    if not names or step.kept.compression.preconditioning != "late":
        return
    means = []
    for flat in step.kept.statistics.pack(names):
        step.stats.island_bytes += flat.nbytes
        stage = f"statistics.{len(means)}"
        mean = yield route.island.all_reduce_async(flat, route.name(bucket, stage))
        means.append(mean.div_(route.num_slices))
    step.kept.statistics.unpack(names, means)
    # A rank of the island that fed an infinite gradient has made the mean infinite: all ranks must
    # undo the step, also those whose own gradients were finite.
    step.magnitudes.spoil_unless_finite(names, means)
