"""The messages of many workers to their sums, all together: for a device, which nobody waits for.

What `unpack` must know of a header before it can go on, the device finds out by itself.
Shapes: as in ops.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parsimony_kernels.packing import ops
from parsimony_kernels.packing.message import NO_POSITION, most_entries, num_words, sections
from parsimony_kernels.runtime.transfer import on_device


class Group(NamedTuple):
    """The sums of a group of messages: of each part (positions from its offset on, values); and
    the flags of each message."""

    parts: list[tuple[Tensor, Tensor]]
    flags: list[tuple[bool, ...]]


class _Sizes(NamedTuple):
    num_messages: int
    num_groups: int
    universe: int
    dim: int
    offsets: Sequence[int]
    num_flags: int

    @property
    def flag_words(self) -> int:
        return num_words(self.num_flags)


class Uniting:
    """Joined messages that are being unpacked and added up on a device, without waiting for it.

    facts: what `read` is to be given, copied to the CPU.
    """

    def __init__(self, united: Any, sizes: _Sizes) -> None:
        self._united, self._sizes, self.facts = united, sizes, united.facts

    def read(self, facts: Tensor) -> list[Group] | None:
        """Return each group's sums; None if any message is not as `pack` writes it. `unpack` of
        the messages one by one tells what is wrong."""
        sizes = self._sizes
        is_wrong, *numbers = facts.tolist()
        end = sizes.num_messages * sizes.flag_words
        words, starts = numbers[:end], numbers[end:]
        flags = [
            ops.read_flags(words[i : i + sizes.flag_words], sizes.num_flags)
            for i in range(0, end, sizes.flag_words)
        ]
        if is_wrong or None in flags:
            return None
        each, parts = sizes.num_messages // sizes.num_groups, len(sizes.offsets)
        return [
            Group(self._parts(group, starts[group * parts :][: parts + 1]),
                  flags[group * each : (group + 1) * each])
            for group in range(sizes.num_groups)
        ]  # fmt: skip

    def _parts(self, group: int, starts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        sizes, ends = self._sizes, (starts[0], starts[-1])
        keys_U = self._united.keys_U[slice(*ends)]
        sums = self._united.sums[slice(*(end * sizes.dim for end in ends))]
        begins = on_device(
            tuple(group * sizes.universe + offset for offset in sizes.offsets), keys_U.device
        )
        positions_U = keys_U - begins[torch.bucketize(keys_U, begins, right=True) - 1]
        counts = [end - begin for begin, end in itertools.pairwise(starts)]
        return list(zip(
            positions_U.split(counts), sums.split([count * sizes.dim for count in counts]),
            strict=True,
        ))  # fmt: skip


def start_uniting(
    messages: Tensor | Sequence[Tensor],
    num_messages: int,
    num_groups: int,
    *,
    offsets: Sequence[int],
    universe: int,
    dim: int,
    index_coding: str,
    value_dtype: str,
    layout: int,
    num_flags: int,
) -> Uniting | None:
    """Begin to unpack messages that are joined end to end, and to add them up.

    That is `unpack` of each and `merge` of each group's, to the bit, without waiting in between.
    Args: messages: (bytes,) uint8, or one such tensor each. num_groups: each group is as many
            messages one after another. offsets: where parts of the universe begin, from 0 on.
    Returns: None where an implementation has nothing to gain by it, or cannot.
    """
    ops.check_format(universe, dim, index_coding, value_dtype)
    dtype = torch.float64 if value_dtype == "float64" else torch.float32
    is_joined = isinstance(messages, Tensor)
    device = (messages if is_joined else messages[0]).device
    module = ops.implementing_module("packing", device.type, dtype)
    if not hasattr(module, "unite") or num_groups * universe >= NO_POSITION:
        return None
    words = ops.words_of(messages if is_joined else torch.cat(list(messages)))
    sizes = _Sizes(num_messages, num_groups, universe, dim, offsets, num_flags)
    form = sections(0, universe, dim, index_coding, value_dtype, num_flags)
    room = most_entries(4 * words.numel(), universe, dim, index_coding, value_dtype)
    joined = module.Joined(
        form, words.numel(), num_messages, num_messages // num_groups, room, dim, sizes.flag_words,
        layout=layout,
    )  # fmt: skip
    begins = (group * universe + offset for group in range(num_groups) for offset in offsets)
    united = module.unite(joined, words, (*begins, num_groups * universe))
    return Uniting(united, sizes)
