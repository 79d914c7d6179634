"""How a bucket travels: one generator a protocol, which yields collectives and ends with the means.

Each starts when its bucket is complete and goes on whenever the collective that it yielded is
done, or the question answered (question.py), so that neither backward nor other buckets are waited
for. `run` is the whole way of a bucket.
In two levels, gradients are first summed within the island of ranks, which leaves each rank with
its slice of every tensor; slices go to the other islands by any of the protocols; and what arrived
is passed on within the island as it is.
Every rank decodes the same messages in the same order, so all have the same bits.
Shapes: N elements of a rank's slice of a tensor (all of it in one level), K entries of a bucket.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.exchange.islands import awake_flags, pass_on, sum_within
from dgc.exchange.merging import Summed, sum_messages
from dgc.exchange.outgoing import Outgoing, take_out
from dgc.exchange.question import Question
from dgc.exchange.route import Route
from dgc.exchange.sparse_all_reduce import join_owners, sparse_all_reduce
from dgc.exchange.step import Step
from dgc.exchange.update import Update
from dgc.wire.buckets import Bucket
from dgc.wire.entries import Entries
from dgc.worker import magnitudes
from dgc.worker.elements import TensorSpec
from dgc.worker.magnitudes import LARGEST_GRADIENT, is_usable, largest_magnitude
from dgc.worker.statistics import divide
from parsimony_kernels.runtime.transfer import on_device

Way = Generator[Handle | Question, Any, Update]


def run(route: Route, step: Step, bucket: Bucket) -> Way:
    """Exchange one bucket, all of whose gradients have come."""
    if bucket.protocol == "rows":
        return (yield from gather_rows(route, step, bucket))
    with step.stats.timed("compensate"):
        step.take_in_waiting(bucket)
    if route.island is not None:
        yield from sum_within(route, step, bucket)
    if bucket.protocol == "dense":
        return (yield from all_reduce(route, step, bucket))
    outgoing = yield from take_out(step, bucket)
    protocol = gather if bucket.protocol == "gather" else sparse_all_reduce
    arrived = yield from protocol(route, step, bucket, outgoing)
    arrived = yield from pass_on(route, step, bucket, arrived)
    return (yield from _take_in(route, step, bucket, outgoing, arrived))


# ---- dense ---------------------------------------------------------------------------------------


def all_reduce(route: Route, step: Step, bucket: Bucket) -> Way:
    """Send all that there is, and which tensors do not rest, in the bucket's dtype: a ring
    all-reduce."""
    with step.stats.timed("pack"):
        whole = {spec.name: step.take_whole(spec.name) for spec in bucket.specs}
        flat = torch.cat([
            *(_drain(step, spec, whole[spec.name]) for spec in bucket.specs),
            awake_flags(step, bucket),
        ])  # fmt: skip
        _mark_bad(step, bucket, whole, flat)
        step.stats.dense_bytes += flat.nbytes
    arrived = yield route.group.all_reduce_async(flat, route.name(bucket))
    arrived = yield from pass_on(route, step, bucket, arrived)
    with step.stats.timed("merge"):
        mean = arrived.div_(route.everyone.world_size)
        numbers = [torch.isfinite(largest_magnitude(mean)).view(1)]
        if any(spec.name in step.resting for spec in bucket.specs):  # else none rests everywhere
            numbers.append(mean.view(route.num_slices, -1)[0, -len(bucket.specs) :] != 0)
    answer = yield Question([part.to(torch.int64) for part in numbers], is_last=True)
    with step.stats.timed("merge"):
        return _split_dense(route, step, bucket, mean, *answer)


def _drain(step: Step, spec: TensorSpec, whole_N: Tensor | None) -> Tensor:
    """Return all that this rank has to send of a tensor, (N,): whole_N, if it is sent as it is."""
    is_bad = spec.name in step.spoilt
    if is_bad or spec.name in step.resting:
        value = math.nan if is_bad else 0.0
        return torch.full((spec.numel,), value, dtype=spec.dtype, device=spec.device)
    if whole_N is not None:
        return whole_N
    values_N = step.kept.compensation.drain(spec.name).to(spec.dtype)
    root_N = step.kept.late_root(spec)
    return values_N if root_N is None else divide(values_N, root_N)


def _mark_bad(step: Step, bucket: Bucket, whole: Mapping[str, Tensor | None], flat: Tensor) -> None:
    """Write a NaN into each tensor whose gradient cannot be used, which makes all ranks undo the
    step. Waits for no GPU.

    whole: of what is sent as it is, not None; there a NaN takes the place of what is too large.
    """
    most = LARGEST_GRADIENT[bucket.dtype]
    if any(whole_N is not None for whole_N in whole.values()):
        flat.masked_fill_(~(flat.abs() <= most), math.nan).add_(0.0)  # -0.0 becomes 0.0
    begins = itertools.accumulate((spec.numel for spec in bucket.specs), initial=0)
    awake = [
        (spec, begin)
        for spec, begin in zip(bucket.specs, begins, strict=False)
        if spec.name not in step.resting and spec.numel and whole[spec.name] is None
    ]
    if awake:
        is_usable = step.largest([spec for spec, _ in awake]) <= most
        places = on_device(tuple(begin for _, begin in awake), flat.device)
        flat[places] = flat[places].masked_fill(~is_usable, math.nan)


def _split_dense(
    route: Route, step: Step, bucket: Bucket, mean: Tensor, is_finite: Tensor, *is_awake: Tensor
) -> Update:
    """Make the update of what arrived: is_finite (1,) says whether it all is; is_awake (T,), if
    tensors rest here, which do not rest everywhere."""
    update = Update()
    sizes = [spec.numel for spec in bucket.specs]
    *rows, _ = mean.view(route.num_slices, -1).split([*sizes, len(sizes)], dim=1)
    if not bool(is_finite):
        pairs = zip(bucket.specs, rows, strict=True)
        update.bad = [spec.name for spec, part in pairs if not magnitudes.is_finite(part)]
        return update
    for number, (spec, part) in enumerate(zip(bucket.specs, rows, strict=True)):
        if spec.name in step.resting and not bool(is_awake[0][number]):
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


def _take_in(route: Route, step: Step, bucket: Bucket, outgoing: Outgoing, arrived: Tensor) -> Way:
    """Decode, sum and average what arrived, here and at the other ranks of the island."""
    is_joined = bucket.protocol == "sparse_all_reduce"
    sums = _sums_of_owners if is_joined else _sums_of_ranks
    slices = yield from sums(route, step, bucket, arrived)
    with step.stats.timed("merge"):
        if is_joined:
            delivered_U, _ = bucket.codec.join(slices[route.slice_index].parts)
            step.stats.num_selected -= outgoing.put_back_the_rest(delivered_U)
        update = Update(bad=_bad_names(route, bucket, slices))
        if update.bad:
            return update
        resting = set.intersection(*(each.resting for each in slices))
        scale = step.kept.compression.update_scale
        _make_means(slices, route.everyone.world_size, scale)
        pairs = zip(bucket.specs, *(each.parts for each in slices), strict=True)
        for number, (spec, *parts) in enumerate(pairs):
            if number not in resting:
                update.sparse[spec.name] = _join_slices(spec, parts)
        return update


def _sums_of_ranks(
    route: Route, step: Step, bucket: Bucket, arrived: Tensor
) -> Generator[Question, Any, list[Summed]]:
    """Return the sums of each slice, of the messages of all ranks that have it."""
    way = sum_messages(
        bucket.codec, arrived, route.group.world_size * route.num_slices, route.num_slices
    )
    return (yield from step.stats.timing("merge", way))


def _sums_of_owners(
    route: Route, step: Step, bucket: Bucket, arrived: Tensor
) -> Generator[Question, Any, list[Summed]]:
    """Return the sums of each slice, as their owners have returned them. On a GPU, waits."""
    with step.stats.timed("merge"):
        codec, each = bucket.codec, route.group.world_size
        messages = codec.split_messages(arrived, each * route.num_slices)
        wholes = [
            join_owners(codec, messages[begin : begin + each])
            for begin in range(0, len(messages), each)
        ]
        return [
            Summed(codec.split(w.positions_K, w.values_M), [w.bad], set(w.resting)) for w in wholes
        ]
    yield


def _bad_names(route: Route, bucket: Bucket, slices: Sequence[Summed]) -> list[str]:
    """Return the tensors that cannot be used, with who has sent them, where that is known."""
    names = [spec.name for spec in bucket.specs]
    sent = [(sender, n) for each in slices for sender, bad in enumerate(each.bad) for n in bad]
    if bucket.protocol == "sparse_all_reduce":
        return list(dict.fromkeys(names[number] for _, number in sent))
    kind = "rank" if route.island is None else "node"
    return [f"{names[number]} ({kind} {sender})" for sender, number in sent]


def _make_means(slices: Sequence[Summed], world_size: int, scale: float) -> None:
    """Make the sums means, times scale; in place, and all of them at once."""
    sums = [sums_K for each in slices for _, sums_K in each.parts]
    torch._foreach_div_(sums, world_size)
    if scale != 1:
        torch._foreach_mul_(sums, scale)


def _join_slices(spec: TensorSpec, slices: Sequence[tuple[Tensor, Tensor]]) -> Entries:
    """Join what arrived of a tensor's slices."""
    if len(slices) == 1:
        return Entries(*slices[0])
    indices_K = torch.cat([indices + n * spec.numel for n, (indices, _) in enumerate(slices)])
    return Entries(indices_K, torch.cat([means for _, means in slices]))


# ---- rows ----------------------------------------------------------------------------------------


def gather_rows(route: Route, step: Step, bucket: Bucket) -> Way:
    """Send the rows of a row-sparse gradient, exactly, to all; nothing of it is left behind."""
    (spec,), codec = bucket.specs, bucket.codec
    with step.stats.timed("pack"):
        rows_K, values_KM = step.rows.release(spec)
        asked = Question([is_usable(values_KM)])
    (is_fine,) = yield asked
    with step.stats.timed("pack"):
        bad = () if bool(is_fine) and spec.name not in step.spoilt else (0,)
        if bad:
            rows_K, values_KM = rows_K[:0], values_KM[:0]
        resting = (0,) if spec.name in step.resting else ()
        message = codec.encode(rows_K, values_KM.reshape(-1), bad, resting)
        step.stats.row_bytes += message.numel()
    everyone = route.everyone
    arrived = yield everyone.all_gather_async(message, route.name(bucket))
    way = sum_messages(codec, arrived, everyone.world_size)
    (summed,) = yield from step.stats.timing("merge", way)
    with step.stats.timed("merge"):
        update = Update()
        update.bad = [f"{spec.name} (rank {r})" for r, bad in enumerate(summed.bad) if bad]
        if not update.bad and not summed.resting:
            ((rows_U, sums),) = summed.parts
            means = sums.div_(everyone.world_size).view(-1, spec.row_size)
            update.rows[spec.name] = (rows_U, means)
        return update
