"""The sparse all-reduce: entries go to the owners of their positions, who sum and return them.

Source: Li & Hoefler 2022 (Ok-Topk, arXiv:2201.07598), split-reduce and balance-gather.
Differs: positions are dealt out in turn, which balances the owners without agreeing on bounds.
Shapes: K entries of a bucket, U positions that at least one rank has sent.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Handle
from dgc.exchange.merging import at_rest, sum_parts
from dgc.exchange.outgoing import Outgoing, keep_for_later
from dgc.exchange.question import Question
from dgc.exchange.route import Route
from dgc.exchange.step import Step
from dgc.selection.ranking import largest_indices
from dgc.wire.buckets import Bucket
from dgc.wire.codec import Codec
from dgc.wire.entries import Entries, from_owner, to_owner


def sparse_all_reduce(
    route: Route, step: Step, bucket: Bucket, outgoing: Outgoing
) -> Generator[Handle | Question, Any, Tensor]:
    """Send entries to the owners of their positions, who sum them and return the largest sums.

    Rank o of P owns every P-th block of positions from the o-th on. It sums what arrives in rank
    order and returns to all at most merged_factor * K / P sums, those of largest magnitude (all if
    merged_factor is P or more); so a rank sends K entries and passes on merged_factor K, however
    many ranks there are, but for a header a message. Entries whose sum was not returned stay with
    those who sent them (`Outgoing.put_back_the_rest`). What rounding takes off a sum stays with its
    owner; where the owner has no statistic to take it back by, its message is exact instead.
    """
    group = route.group
    with step.stats.timed("pack"):
        parts, sent_K = _pack_for_owners(bucket, outgoing, group.world_size)
        outgoing.keep_lost(sent_K)
        step.stats.sparse_bytes += sum(part.numel() for part in parts)
    received = yield group.all_to_all_async(
        parts, route.name(bucket, "owners"), largest_part_bytes(bucket, group.world_size)
    )
    way = _merge_own_part(route, step, bucket, received)
    message = yield from step.stats.timing("merge", way)
    step.stats.sparse_bytes += message.numel()
    return (yield group.all_gather_async(message, route.name(bucket)))


def largest_part_bytes(bucket: Bucket, num_owners: int) -> int | None:
    """Return how many bytes a message to an owner has at most, on any rank; None: too many."""
    num_entries = sum(max(plan.k + 1, plan.k_bounds[1]) for plan in bucket.plans)
    part = bucket.codec.of_owner(0, num_owners)  # owner 0's part is the largest
    try:
        return part.message_bytes(min(num_entries, part.universe))
    except OverflowError:  # a message of so many entries would be too long
        return None


def _pack_for_owners(
    bucket: Bucket, outgoing: Outgoing, num_owners: int
) -> tuple[list[Tensor], Tensor]:
    """Return a message to each owner, and the values (K,) as the owners will decode them."""
    positions_K, values_K, bad, resting = outgoing.entries
    owner_K, local_K = to_owner(positions_K, num_owners)
    sent_K, parts = torch.empty_like(values_K), []
    by_owner = owner_K.sort(stable=True).indices
    counts = torch.bincount(owner_K, minlength=num_owners).tolist()
    for owner, chosen in enumerate(by_owner.split(counts)):
        codec = bucket.codec.of_owner(owner, num_owners)
        sent_K[chosen] = values = codec.round_values(values_K[chosen])
        parts.append(codec.encode(local_K[chosen], values, bad, resting))
    return parts, sent_K


def _merge_own_part(
    route: Route, step: Step, bucket: Bucket, received: Sequence[Tensor]
) -> Generator[Question, Any, Tensor]:
    """Sum what the ranks sent of the positions that are this rank's own; return the message of the
    largest sums."""
    owner, num_owners = route.group.rank, route.group.world_size
    codec = bucket.codec.of_owner(owner, num_owners)
    summed = yield from sum_parts(codec, received)
    bad = tuple(sorted({number for of_sender in summed.bad for number in of_sender}))
    ((local_U, sums_U),) = summed.parts
    factor = step.kept.compression.merged_factor
    quota = math.ceil(factor * bucket.num_entries / num_owners)
    if factor < num_owners and local_U.numel() > quota:
        chosen = largest_indices(sums_U.abs(), quota)
        local_U, sums_U = local_U[chosen], sums_U[chosen]
    returned_U = codec.round_values(sums_U)
    positions_U = from_owner(local_U, owner, num_owners)
    if returned_U is not sums_U and not bad:
        parts = bucket.codec.split(positions_U, sums_U - returned_U)
        is_kept = yield from keep_for_later(step.kept, bucket, parts)
        if not is_kept:
            codec, returned_U = codec.exact, sums_U
    return codec.encode(local_U, returned_U, bad, summed.resting)


def join_owners(codec: Codec, messages: Sequence[Tensor]) -> Entries:
    """Return the entries of all owners' messages, by position."""
    num_owners = len(messages)
    parts = [
        codec.of_owner(owner, num_owners).decode_any(message)
        for owner, message in enumerate(messages)
    ]
    positions = [from_owner(part.positions_K, n, num_owners) for n, part in enumerate(parts)]
    order = torch.cat(positions).sort()
    values = torch.cat([part.values_M for part in parts])[order.indices]
    bad = {number for part in parts for number in part.bad}
    return Entries(order.values, values, tuple(sorted(bad)), tuple(sorted(at_rest(parts))))
