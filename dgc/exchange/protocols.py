"""How a bucket travels: one generator a protocol, which yields collectives and ends with the means.

Each starts when its bucket is complete and goes on whenever the collective that it yielded is
done, so that neither backward nor other buckets are waited for. `run` is the whole way of a bucket.
In two levels, gradients are first summed within the island of ranks, which leaves each rank with
its slice of every tensor; slices go to the other islands by any of the protocols; and what arrived
is passed on within the island as it is.
Every rank decodes the same messages in the same order, so all have the same bits.
Shapes: N elements of a rank's slice of a tensor (all of it in one level), K entries of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.exchange.islands import awake_flags, names_at_rest, pass_on, sum_within
from dgc.exchange.merging import at_rest, merge_in_rank_order
from dgc.exchange.outgoing import Outgoing, take_out
from dgc.exchange.route import Route
from dgc.exchange.sparse_all_reduce import join_owners, sparse_all_reduce
from dgc.exchange.step import Step
from dgc.exchange.update import Update
from dgc.wire.buckets import Bucket
from dgc.wire.entries import Entries
from dgc.worker.elements import TensorSpec
from dgc.worker.magnitudes import is_finite, is_usable
from dgc.worker.statistics import divide

Way = Generator[Handle, Any, Update]


def run(route: Route, step: Step, bucket: Bucket) -> Way:
    """Exchange one bucket, all of whose gradients have come."""
    if bucket.protocol == "rows":
        return (yield from gather_rows(route, step, bucket))
    if route.island is not None:
        yield from sum_within(route, step, bucket)
    founds, reports = step.read(bucket)
    bad = step.bad_tensors(bucket, reports)
    if bucket.protocol == "dense":
        return (yield from all_reduce(route, step, bucket, bad))
    with step.stats.timed("select"):
        outgoing = take_out(step, bucket, founds, reports, bad)
    protocol = gather if bucket.protocol == "gather" else sparse_all_reduce
    arrived = yield from protocol(route, step, bucket, outgoing)
    arrived = yield from pass_on(route, step, bucket, arrived)
    with step.stats.timed("merge"):
        return _take_in(route, step, bucket, outgoing, arrived)


# ---- dense ---------------------------------------------------------------------------------------


def all_reduce(route: Route, step: Step, bucket: Bucket, bad: set[int]) -> Way:
    """Send all that there is, and which tensors do not rest, in the bucket's dtype: a ring
    all-reduce."""
    with step.stats.timed("pack"):
        parts = [_drain(step, spec, n in bad) for n, spec in enumerate(bucket.specs)]
        flat = torch.cat([*parts, awake_flags(step, bucket)])
        step.stats.dense_bytes += flat.nbytes
    arrived = yield route.group.all_reduce_async(flat, route.name(bucket))
    arrived = yield from pass_on(route, step, bucket, arrived)
    with step.stats.timed("merge"):
        return _split_dense(route, step, bucket, arrived.div_(route.everyone.world_size))


def _drain(step: Step, spec: TensorSpec, is_bad: bool) -> Tensor:
    """Return all that this rank has to send of a tensor, (N,)."""
    if is_bad or spec.name in step.resting:
        value = math.nan if is_bad else 0.0
        return torch.full((spec.numel,), value, dtype=spec.dtype, device=spec.device)
    values_N = step.kept.compensation.drain(spec.name).to(spec.dtype)
    root_N = step.kept.late_root(spec)
    return values_N if root_N is None else divide(values_N, root_N)


def _split_dense(route: Route, step: Step, bucket: Bucket, mean: Tensor) -> Update:
    update = Update()
    sizes = [spec.numel for spec in bucket.specs]
    *rows, flags = mean.view(route.num_slices, -1).split([*sizes, len(sizes)], dim=1)
    if not is_finite(mean):
        names = [spec.name for spec in bucket.specs]
        pairs = zip(names, rows, strict=True)
        update.bad = [name for name, part in pairs if not is_finite(part)]
        return update
    resting = names_at_rest(step, bucket, flags[0])
    for spec, part in zip(bucket.specs, rows, strict=True):
        if spec.name in resting:
            continue
        mean_N = part.reshape(-1)[: spec.whole]
        scale = step.kept.compression.update_scale if spec.compressible else 1.0
        update.dense[spec.name] = mean_N if scale == 1 else mean_N * scale
    return update


# ---- sparse --------------------------------------------------------------------------------------


def gather(
    route: Route, step: Step, bucket: Bucket, outgoing: Outgoing
) -> Generator[Handle, Any, Tensor]:
    """Send each rank's entries to all: what a rank passes on grows with the number of ranks."""
    with step.stats.timed("pack"):
        positions_K, values_K, bad, resting = outgoing.entries
        sent_K = bucket.codec.round_values(values_K)
        outgoing.keep_lost(sent_K)
        message = bucket.codec.encode(positions_K, sent_K, bad, resting)
        step.stats.sparse_bytes += message.numel()
    return (yield route.group.all_gather_async(message, route.name(bucket)))


def _take_in(
    route: Route, step: Step, bucket: Bucket, outgoing: Outgoing, arrived: Tensor
) -> Update:
    """Decode, sum and average what arrived, here and at the other ranks of the island."""
    num_messages = route.group.world_size
    messages = bucket.codec.split_messages(arrived, num_messages * route.num_slices)
    update, slices, sums_of = Update(), [], []
    for index in range(route.num_slices):
        mine = messages[index * num_messages : (index + 1) * num_messages]
        sums = _sum_messages(route, bucket, mine, update.bad)
        if index == route.slice_index and bucket.protocol == "sparse_all_reduce":
            step.stats.num_selected -= outgoing.put_back_the_rest(sums.positions_K)
        slices.append(bucket.codec.split(sums.positions_K, sums.values_M))
        sums_of.append(sums)
    if not update.bad:
        resting = at_rest(sums_of)
        scale = step.kept.compression.update_scale
        for number, (spec, *parts) in enumerate(zip(bucket.specs, *slices, strict=True)):
            if number not in resting:
                update.sparse[spec.name] = _mean(spec, parts, route.everyone.world_size, scale)
    return update


def _sum_messages(
    route: Route, bucket: Bucket, messages: Sequence[Tensor], bad: list[str]
) -> Entries:
    """Return sums over ranks; tell which tensors cannot be used."""
    codec, names = bucket.codec, [spec.name for spec in bucket.specs]
    if bucket.protocol == "sparse_all_reduce":
        whole = join_owners(codec, messages)
        bad += [names[number] for number in whole.bad if names[number] not in bad]
        return whole
    entries = [codec.decode_one(message) for message in messages]
    sender = "rank" if route.island is None else "node"
    bad += [
        f"{names[number]} ({sender} {index})"
        for index, part in enumerate(entries)
        for number in part.bad
    ]
    return Entries(*merge_in_rank_order(entries), (), tuple(at_rest(entries)))


def _mean(
    spec: TensorSpec, slices: Sequence[tuple[Tensor, Tensor]], world_size: int, scale: float
) -> Entries:
    """Join the sums of a tensor's slices, and make them means, times scale."""
    indices_K = torch.cat([indices + n * spec.numel for n, (indices, _) in enumerate(slices)])
    means_K = torch.cat([sums for _, sums in slices]).div_(world_size)
    return Entries(indices_K, means_K if scale == 1 else means_K.mul_(scale))


# ---- rows ----------------------------------------------------------------------------------------


def gather_rows(route: Route, step: Step, bucket: Bucket) -> Way:
    """Send the rows of a row-sparse gradient, exactly, to all; nothing of it is left behind."""
    (spec,), codec = bucket.specs, bucket.codec
    with step.stats.timed("pack"):
        rows_K, values_KM = step.rows.release(spec)
        bad = () if is_usable(values_KM) and spec.name not in step.spoilt else (0,)
        if bad:
            rows_K, values_KM = rows_K[:0], values_KM[:0]
        resting = (0,) if spec.name in step.resting else ()
        message = codec.encode(rows_K, values_KM.reshape(-1), bad, resting)
        step.stats.row_bytes += message.numel()
    everyone = route.everyone
    arrived = yield everyone.all_gather_async(message, route.name(bucket))
    with step.stats.timed("merge"):
        entries = codec.decode(arrived, everyone.world_size)
        update = Update()
        update.bad = [f"{spec.name} (rank {r})" for r, part in enumerate(entries) if part.bad]
        if not update.bad and not at_rest(entries):
            rows_U, sums = merge_in_rank_order(entries, spec.row_size)
            means = sums.div_(everyone.world_size).view(-1, spec.row_size)
            update.rows[spec.name] = (rows_U, means)
        return update
