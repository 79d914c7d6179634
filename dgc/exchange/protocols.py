"""How a bucket travels: one generator a protocol, which yields collectives and ends with the means.

Each starts when its bucket is complete and goes on whenever the collective that it yielded is
done, so that backward, and other buckets, are not waited for. `run` is the whole way of a bucket:
in two levels, gradients are first summed within the island of ranks, each rank being left with its
share of every tensor; shares are exchanged over the bridge to the other islands by any of the
protocols; and what arrived is passed on within the island as it is.
Every rank decodes the same messages in the same order, so all have the same bits.
Shapes: N elements of a rank's share of a tensor (all of it in one level), K entries of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.exchange.islands import awake_flags, names_at_rest, pass_on, sum_within
from dgc.exchange.outgoing import Outgoing, where_delivered
from dgc.selection.selector import SparseGrad, largest_indices
from dgc.wire.buckets import Bucket, TensorSpec
from dgc.wire.codec import Codec, Entries, from_share, to_share
from dgc.worker.magnitudes import is_finite, is_usable
from dgc.worker.statistics import divide
from parsimony_kernels.packing import ops as packing

if TYPE_CHECKING:
    from dgc.exchange.exchange import Exchange

Way = Generator[Handle, Any, "Update"]


@dataclass
class Update:
    """What the ranks agreed on, by tensor: means (N,), some entries of them, or rows of them.

    A tensor that rests on all ranks is in none of them.
    bad: the tensors, with ranks where they are known, because of which there is no update.
    """

    dense: dict[str, Tensor] = field(default_factory=dict)
    sparse: dict[str, SparseGrad] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def take_in(self, other: Update) -> None:
        self.dense |= other.dense
        self.sparse |= other.sparse
        self.rows |= other.rows
        self.bad += other.bad


def run(exchange: Exchange, bucket: Bucket) -> Way:
    """Exchange one bucket, all of whose gradients have come."""
    if bucket.protocol == "rows":
        return (yield from gather_rows(exchange, bucket))
    if exchange.island is not None:
        yield from sum_within(exchange, bucket)
    founds, reports = exchange.read(bucket)
    bad = exchange.bad_places(bucket, reports)
    if bucket.protocol == "dense":
        return (yield from all_reduce(exchange, bucket, bad))
    with exchange.stats.timed("select"):
        outgoing = exchange.outlet.take(bucket, founds, reports, bad)
        exchange.note_selected(bucket, outgoing)
    protocol = gather if bucket.protocol == "gather" else sparse_all_reduce
    arrived = yield from protocol(exchange, bucket, outgoing)
    arrived = yield from pass_on(exchange, bucket, arrived)
    with exchange.stats.timed("merge"):
        return _take_in(exchange, bucket, outgoing, arrived)


# ---- between all ranks, or islands ----


def all_reduce(exchange: Exchange, bucket: Bucket, bad: set[int]) -> Way:
    """Send all that there is, and which tensors do not rest, in the bucket's dtype: a ring
    all-reduce."""
    with exchange.stats.timed("pack"):
        parts = [_drain(exchange, spec, n in bad) for n, spec in enumerate(bucket.specs)]
        flat = torch.cat([*parts, awake_flags(exchange, bucket)])
        exchange.stats.dense_bytes += flat.nbytes
    arrived = yield exchange.group.all_reduce_async(flat, exchange.name_of(bucket))
    arrived = yield from pass_on(exchange, bucket, arrived)
    with exchange.stats.timed("merge"):
        return _split_dense(exchange, bucket, arrived.div_(exchange.comm.world_size))


def _drain(exchange: Exchange, spec: TensorSpec, is_bad: bool) -> Tensor:
    """Return all that this rank has to send of a tensor, (N,)."""
    if is_bad or spec.name in exchange.resting:
        value = math.nan if is_bad else 0.0
        return torch.full((spec.numel,), value, dtype=spec.dtype, device=spec.device)
    values_N = exchange.compensation.drain(spec.name).to(spec.dtype)
    root_N = exchange.outlet.late_root(spec)
    return values_N if root_N is None else divide(values_N, root_N)


def _split_dense(exchange: Exchange, bucket: Bucket, mean: Tensor) -> Update:
    update = Update()
    sizes = [spec.numel for spec in bucket.specs]
    *rows, flags = mean.view(exchange.num_shares, -1).split([*sizes, len(sizes)], dim=1)
    if not is_finite(mean):
        names = [spec.name for spec in bucket.specs]
        pairs = zip(names, rows, strict=True)
        update.bad = [name for name, part in pairs if not is_finite(part)]
        return update
    resting = names_at_rest(exchange, bucket, flags[0])
    for spec, part in zip(bucket.specs, rows, strict=True):
        if spec.name in resting:
            continue
        mean_N = part.reshape(-1)[: spec.whole]
        scale = exchange.compression.update_scale if spec.compressible else 1.0
        update.dense[spec.name] = mean_N if scale == 1 else mean_N * scale
    return update


def gather(
    exchange: Exchange, bucket: Bucket, outgoing: Outgoing
) -> Generator[Handle, Any, Tensor]:
    """Send each rank's entries to all: what a rank passes on grows with the number of ranks."""
    with exchange.stats.timed("pack"):
        sent_K = bucket.codec.round_values(outgoing.divided_K)
        exchange.outlet.keep_lost(outgoing, sent_K)
        message = bucket.codec.encode(outgoing.positions_K, sent_K, outgoing.bad, outgoing.resting)
        exchange.stats.sparse_bytes += message.numel()
    return (yield exchange.group.all_gather_async(message, exchange.name_of(bucket)))


def sparse_all_reduce(
    exchange: Exchange, bucket: Bucket, outgoing: Outgoing
) -> Generator[Handle, Any, Tensor]:
    """Send entries to the owners of their positions, who sum them and return the largest sums.

    Rank o of P owns every P-th block of positions from the o-th on. It sums what arrives in rank
    order and returns to all at most merged_factor * K / P sums, those of largest magnitude (all if
    merged_factor is P or more); so a rank sends K entries and passes on merged_factor K, however
    many ranks there are, but for a header a message. Entries whose sum was not returned stay with
    those who sent them (`_put_back_the_rest`). What rounding takes off a sum stays with its owner;
    where the owner has no statistic to take it back by, its message is exact instead.
    Source: Li & Hoefler 2022 (Ok-Topk, arXiv:2201.07598), split-reduce and balance-gather.
    Differs: positions are dealt out in turn, which balances the owners without agreeing on bounds.
    """
    group = exchange.group
    with exchange.stats.timed("pack"):
        parts, sent_K = _pack_shares(exchange, bucket, outgoing)
        exchange.outlet.keep_lost(outgoing, sent_K)
        exchange.stats.sparse_bytes += sum(part.numel() for part in parts)
    received = yield group.all_to_all_async(
        parts, exchange.name_of(bucket, "shares"), largest_share(bucket, group.world_size)
    )
    with exchange.stats.timed("merge"):
        message = _merge_share(exchange, bucket, received)
        exchange.stats.sparse_bytes += message.numel()
    return (yield group.all_gather_async(message, exchange.name_of(bucket)))


def largest_share(bucket: Bucket, num_owners: int) -> int | None:
    """Return how many bytes a message to an owner has at most, on any rank; None: too many."""
    num_entries = sum(max(plan.k + 1, plan.k_bounds[1]) for plan in bucket.plans)
    share = bucket.codec.share(0, num_owners)  # of the largest
    try:
        return share.message_bytes(min(num_entries, share.universe))
    except OverflowError:  # were one owner sent all of it
        return None


def _pack_shares(
    exchange: Exchange, bucket: Bucket, outgoing: Outgoing
) -> tuple[list[Tensor], Tensor]:
    """Return a message to each owner, and the values (K,) as the owners will decode them."""
    num_owners = exchange.group.world_size
    owner_K, local_K = to_share(outgoing.positions_K, num_owners)
    sent_K, parts = torch.empty_like(outgoing.divided_K), []
    by_owner = owner_K.sort(stable=True).indices
    counts = torch.bincount(owner_K, minlength=num_owners).tolist()
    for owner, chosen in enumerate(by_owner.split(counts)):
        share = bucket.codec.share(owner, num_owners)
        sent_K[chosen] = values = share.round_values(outgoing.divided_K[chosen])
        parts.append(share.encode(local_K[chosen], values, outgoing.bad, outgoing.resting))
    return parts, sent_K


def _merge_share(exchange: Exchange, bucket: Bucket, received: Sequence[Tensor]) -> Tensor:
    """Sum what the ranks sent of this rank's share; return the message of its largest sums."""
    group = exchange.group
    share = bucket.codec.share(group.rank, group.world_size)
    entries = [share.decode_one(part) for part in received]
    bad = tuple(sorted({place for part in entries for place in part.bad}))
    local_U, sums_U = merge_in_rank_order(entries)
    factor = exchange.compression.merged_factor
    quota = math.ceil(factor * bucket.num_entries / group.world_size)
    if factor < group.world_size and local_U.numel() > quota:
        chosen = largest_indices(sums_U.abs(), quota)
        local_U, sums_U = local_U[chosen], sums_U[chosen]
    returned_U = share.round_values(sums_U)
    positions_U = from_share(local_U, group.rank, group.world_size)
    if returned_U is not sums_U and not bad:
        is_kept = exchange.outlet.add(bucket, positions_U, sums_U - returned_U)
        if not is_kept:
            share, returned_U = share.exact, sums_U
    return share.encode(local_U, returned_U, bad, at_rest(entries))


def _join_shares(codec: Codec, messages: Sequence[Tensor]) -> Entries:
    """Return the entries of all owners' messages, by position."""
    num_owners = len(messages)
    parts = [codec.share(n, num_owners).decode_any(message) for n, message in enumerate(messages)]
    positions = [from_share(part.positions_K, n, num_owners) for n, part in enumerate(parts)]
    order = torch.cat(positions).sort()
    values = torch.cat([part.values_M for part in parts])[order.indices]
    bad = {place for part in parts for place in part.bad}
    return Entries(order.values, values, tuple(sorted(bad)), tuple(sorted(at_rest(parts))))


# ---- what arrived ----


def _take_in(exchange: Exchange, bucket: Bucket, outgoing: Outgoing, arrived: Tensor) -> Update:
    """Decode, sum and average what arrived, here and at the other ranks of the island."""
    num_messages = exchange.group.world_size
    messages = bucket.codec.split_messages(arrived, num_messages * exchange.num_shares)
    update, shares, sums_of = Update(), [], []
    for share in range(exchange.num_shares):
        mine = messages[share * num_messages : (share + 1) * num_messages]
        sums = _sum_messages(exchange, bucket, mine, update.bad)
        if share == exchange.place and bucket.protocol == "sparse_all_reduce":
            _put_back_the_rest(exchange, outgoing, sums.positions_K)
        shares.append(bucket.codec.split(sums.positions_K, sums.values_M))
        sums_of.append(sums)
    if not update.bad:
        resting = at_rest(sums_of)
        for place, (spec, *parts) in enumerate(zip(bucket.specs, *shares, strict=True)):
            if place not in resting:
                update.sparse[spec.name] = _mean(exchange, spec, parts)
    return update


def at_rest(entries: Sequence[Entries]) -> set[int]:
    """Return the places of the tensors that rest at all of the senders."""
    return set.intersection(*(set(part.resting) for part in entries))


def _sum_messages(
    exchange: Exchange, bucket: Bucket, messages: Sequence[Tensor], bad: list[str]
) -> Entries:
    """Return sums over ranks; tell which tensors cannot be used."""
    codec, names = bucket.codec, [spec.name for spec in bucket.specs]
    if bucket.protocol == "sparse_all_reduce":
        whole = _join_shares(codec, messages)
        bad += [names[place] for place in whole.bad if names[place] not in bad]
        return whole
    entries = [codec.decode_one(message) for message in messages]
    sender = "rank" if exchange.island is None else "node"
    bad += [
        f"{names[place]} ({sender} {number})"
        for number, part in enumerate(entries)
        for place in part.bad
    ]
    return Entries(*merge_in_rank_order(entries), (), tuple(at_rest(entries)))


def _put_back_the_rest(exchange: Exchange, outgoing: Outgoing, delivered_U: Tensor) -> None:
    """Undo the taking of entries whose sums the owners did not return."""
    is_back_K = ~where_delivered(outgoing, delivered_U)
    exchange.outlet.put_back(outgoing, is_back_K)
    exchange.stats.num_selected -= int(is_back_K.sum())


def merge_in_rank_order(entries: Sequence[Entries], dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return the positions, ascending, and the sums of their values: the same bits on every rank.

    Example: {2: 1.0, 5: 3.0} and {5: 1.0} -> {2: 1.0, 5: 4.0}.
    """
    return packing.merge([e.positions_K for e in entries], [e.values_M for e in entries], dim)


def _mean(
    exchange: Exchange, spec: TensorSpec, shares: Sequence[tuple[Tensor, Tensor]]
) -> SparseGrad:
    """Join the sums of a tensor's shares, and make them means."""
    indices_K = torch.cat([indices + n * spec.numel for n, (indices, _) in enumerate(shares)])
    means_K = torch.cat([sums for _, sums in shares]).div_(exchange.comm.world_size)
    if exchange.compression.update_scale != 1:
        means_K.mul_(exchange.compression.update_scale)
    return SparseGrad(means_K, indices_K, spec.whole)


def gather_rows(exchange: Exchange, bucket: Bucket) -> Way:
    """Send the rows of a row-sparse gradient, exactly, to all; nothing of it is left behind."""
    (spec,), codec = bucket.specs, bucket.codec
    with exchange.stats.timed("pack"):
        rows_K, values_KM = exchange.rows.release(spec)
        bad = () if is_usable(values_KM) and spec.name not in exchange.spoilt else (0,)
        if bad:
            rows_K, values_KM = rows_K[:0], values_KM[:0]
        resting = (0,) if spec.name in exchange.resting else ()
        message = codec.encode(rows_K, values_KM.reshape(-1), bad, resting)
        exchange.stats.row_bytes += message.numel()
    arrived = yield exchange.comm.all_gather_async(message, exchange.name_of(bucket))
    with exchange.stats.timed("merge"):
        entries = codec.decode(arrived, exchange.comm.world_size)
        update = Update()
        update.bad = [f"{spec.name} (rank {r})" for r, part in enumerate(entries) if part.bad]
        if not update.bad and not at_rest(entries):
            rows_U, sums = merge_in_rank_order(entries, spec.row_size)
            means = sums.div_(exchange.comm.world_size).view(-1, spec.row_size)
            update.rows[spec.name] = (rows_U, means)
        return update
