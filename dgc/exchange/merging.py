"""Several senders' entries to one sum, in rank order, so that every rank has the same bits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dgc.exchange.question import Question
from dgc.wire.codec import Codec
from dgc.wire.entries import Entries
from parsimony_kernels.packing import ops as packing


class Summed(NamedTuple):
    """What some senders' messages come to.

    parts: each tensor's (indices, sums). bad: of each sender, the numbers of the tensors that
    cannot be used. resting: of the tensors that rest at all of the senders.
    """

    parts: list[tuple[Tensor, Tensor]]
    bad: list[tuple[int, ...]]
    resting: set[int]


def sum_messages(
    codec: Codec, joined: Tensor, num_messages: int, num_groups: int = 1
) -> Generator[Question, Any, list[Summed]]:
    """Read messages that are joined end to end, and sum each group of them. The last question.

    Raises: MessageError, saying what is wrong.
    """
    uniting = codec.start_uniting(joined, num_messages, num_groups)
    if uniting is not None:
        (facts,) = yield Question([uniting.facts], is_last=True)
        groups = uniting.read(facts)
        if groups is not None:
            return [_summed(codec, *group) for group in groups]
    each = num_messages // num_groups
    messages = codec.split_messages(joined, num_messages)
    entries = [codec.decode_one(message) for message in messages]
    return [
        _sum_entries(entries[begin : begin + each], codec, codec.split)
        for begin in range(0, num_messages, each)
    ]


def sum_parts(codec: Codec, parts: Sequence[Tensor]) -> Generator[Question, Any, Summed]:
    """Read messages, each a tensor, and sum them; all positions are one part. Asks once.

    Raises: MessageError, saying what is wrong.
    """
    uniting = codec.start_uniting(parts, len(parts), 1, offsets=(0,))
    if uniting is not None:
        (facts,) = yield Question([uniting.facts])
        groups = uniting.read(facts)
        if groups is not None:
            return _summed(codec, *groups[0])
    entries = [codec.decode_one(part) for part in parts]
    return _sum_entries(entries, codec, lambda *sums: [sums])


def _summed(
    codec: Codec, parts: list[tuple[Tensor, Tensor]], flags: Sequence[tuple[bool, ...]]
) -> Summed:
    numbers = [codec.numbers_of(of_message) for of_message in flags]
    resting = set.intersection(*(set(resting) for _, resting in numbers))
    return Summed(parts, [bad for bad, _ in numbers], resting)


def _sum_entries(
    entries: Sequence[Entries],
    codec: Codec,
    split: Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> Summed:
    sums = packing.merge(
        [part.positions_K for part in entries], [part.values_M for part in entries], codec.dim
    )
    return Summed(split(*sums), [part.bad for part in entries], at_rest(entries))


def at_rest(entries: Sequence[Entries]) -> set[int]:
    """Return the numbers of the tensors that rest at all of the senders."""
    return set.intersection(*(set(part.resting) for part in entries))
