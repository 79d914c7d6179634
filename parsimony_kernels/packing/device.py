"""The operations in CUDA, by device.cu. ops.py has checked the arguments.

Work goes to torch's current stream of the tensors' device. `pack` and `round_values` do not wait
for it; `unpack` waits for what was found, `merge` for how many positions there are. Temporaries:
12 bytes for each 32 bits of Elias-Fano's upper part; to merge, a few times what comes in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_uint32, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from parsimony_kernels.packing.message import (
    CHECKSUM_WORD,
    GROUP,
    INDEX_CODINGS,
    NO_POSITION,
    Problem,
    Sections,
)
from parsimony_kernels.runtime.launch import THREADS, Argument, launch
from parsimony_kernels.runtime.transfer import on_device

MAX_BLOCKS = 2**16  # kernels stride over what is more
_ELIAS_FANO = INDEX_CODINGS.index("elias_fano")


class Packing(Argument):
    _fields_ = (
        ("parts", Sections),
        *((name, c_void_p) for name in ("words", "positions", "values", "rounded")),
        *((name, c_void_p) for name in ("counts", "ends", "found")),
    )


class Message(ctypes.Structure):
    _fields_ = (("parts", Sections), ("first_word", c_int64), ("first_entry", c_int64))


class Joined(Argument):
    _fields_ = (
        ("form", Sections),
        *((name, c_int64) for name in ("num_words", "num_messages", "messages_per_group")),
        *((name, c_int64) for name in ("room", "dim", "flag_words")),
        *((name, c_void_p) for name in ("words", "messages", "flags", "found", "counts", "ends")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("layout", c_uint32),
    )


class United(NamedTuple):
    """Joined messages added up: keys (room,) and sums (room * dim,), of which the first count.

    facts: int64: whether any message is wrong; the flags' words (messages, flag_words); how many
    keys lie before each of the bounds.
    """

    keys_U: Tensor
    sums: Tensor
    facts: Tensor


class Merging(Argument):
    _fields_ = (
        *((name, c_int64) for name in ("num_entries", "dim")),
        *((name, c_void_p) for name in ("sorted", "order", "ranks")),
        *((name, c_void_p) for name in ("values", "positions", "sums")),
    )


def round_values(values_M: Tensor, coding: int) -> Tensor:
    work = Packing(Sections(num_values=values_M.numel(), value_coding=coding))
    rounded = torch.empty_like(values_M)
    work.point(values=values_M, rounded=rounded)
    _launch("round_values", work, _in_groups(work.parts), values_M.device)
    return rounded


def pack(words: Tensor, parts: Sections, positions_K: Tensor, values_M: Tensor) -> int:
    """Write all but the header's other words and the flags."""
    work, where = Packing(parts), words.device
    found = torch.zeros(2, dtype=torch.int32, device=where)
    work.point(words=words, positions=positions_K, values=values_M, found=found)
    _launch("pack_positions", work, parts.values - parts.indices, where)
    _launch("pack_values", work, _in_groups(parts), where)
    _launch("message_checksum", work, parts.end, where)
    words[CHECKSUM_WORD] = found[0]  # the device's own copy: the host does not wait
    return 0


def unpack(words: Tensor, parts: Sections) -> tuple[Tensor, Tensor, int]:
    work, where = Packing(parts), words.device
    found = torch.zeros(2, dtype=torch.int32, device=where)
    positions_K = words.new_empty(parts.num_entries, dtype=torch.int64)
    values_M = words.new_empty(parts.num_values, dtype=torch.float32)
    work.point(words=words, positions=positions_K, values=values_M, found=found)
    _launch("message_checksum", work, parts.end, where)
    if parts.index_coding == _ELIAS_FANO and parts.num_entries > 0:
        counts = words.new_empty(parts.low - parts.indices)
        work.point(counts=counts)
        _launch("unpack_counts", work, counts.numel(), where)
        work.point(ends=counts.cumsum(0))
        _launch("unpack_coded", work, counts.numel(), where)
    else:
        _launch("unpack_plain", work, parts.num_entries, where)
    _launch("check_positions", work, parts.num_entries, where)
    _launch("unpack_values", work, parts.num_values, where)
    difference, problems = found.tolist()
    return positions_K, values_M, problems | (Problem.CHECKSUM if difference else 0)


def unite(joined: Joined, words: Tensor, bounds: tuple[int, ...]) -> United:
    """Unpack joined messages and add them up by key; wait for nothing. See ops.start_uniting.

    joined: its numbers and sizes are set. bounds: keys, ascending.
    """
    where, num, room, dim = words.device, joined.num_messages, joined.room, joined.dim
    found = torch.zeros(num, 2, dtype=torch.int32, device=where)
    flags = torch.empty(num, joined.flag_words, dtype=torch.int32, device=where)
    keys = torch.full((room,), NO_POSITION, dtype=torch.int64, device=where)
    values = torch.empty(room * dim, dtype=torch.float32, device=where)
    counts = torch.empty(words.numel(), dtype=torch.int32, device=where)
    size = ctypes.sizeof(Message) * (num + 1)
    messages = torch.empty(size // 8, dtype=torch.int64, device=where)
    joined.point(words=words, messages=messages, flags=flags, found=found, counts=counts)
    joined.point(keys=keys, values=values)
    _launch("find_messages", joined, 1, where)
    _launch("count_joined", joined, words.numel(), where)
    joined.point(ends=counts.cumsum(0))
    _launch("unpack_joined_positions", joined, words.numel(), where)
    _launch("unpack_joined_values", joined, room * dim, where)

    in_order, order = keys.sort(stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    work = Merging(room, dim)
    keys_U, sums = torch.full_like(keys, NO_POSITION), torch.empty_like(values)
    work.point(sorted=in_order, order=order, ranks=is_first.cumsum(0), values=values)
    work.point(positions=keys_U, sums=sums)
    _launch("merge_sums", work, room * dim, where)

    is_wrong = (found[:, 0] != 0) | (found[:, 1] != 0)
    starts = torch.searchsorted(keys_U, on_device(bounds, where))
    facts = torch.cat([is_wrong.any().view(1).long(), flags.view(-1).long(), starts])
    return United(keys_U, sums, facts)


def merge(positions: Sequence[Tensor], values: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    joined, values_M = torch.cat(list(positions)), torch.cat(list(values))
    if joined.numel() == 0:
        return joined, values_M
    work = Merging(joined.numel(), dim)
    in_order, order = joined.sort(stable=True)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
    ranks = is_first.cumsum(0)
    count = int(ranks[-1])
    positions_U, sums = joined.new_empty(count), values_M.new_empty(count * dim)
    work.point(sorted=in_order, order=order, ranks=ranks, values=values_M)
    work.point(positions=positions_U, sums=sums)
    _launch("merge_sums", work, joined.numel() * dim, joined.device)
    return positions_U, sums


def _in_groups(parts: Sections) -> int:
    """Return the threads that values need where a warp takes each group."""
    return -(-parts.num_values // GROUP) * GROUP


def _launch(name: str, work: Packing | Merging, num_items: int, where: torch.device) -> None:
    if num_items > 0:
        launch(name, min(-(-num_items // THREADS), MAX_BLOCKS), work, where)
