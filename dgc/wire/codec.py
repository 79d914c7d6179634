"""Entries to bytes and back: one message holds the chosen entries of a bucket's tensors.

A bucket's tensors lie end to end, so that an entry is one position in [0, universe) and `dim`
values: 1, or a whole row of a row-sparse gradient. Positions ascend; values follow in their order.

Message, version 3: little-endian words of 32 bits, each part starting at a word, unused bits 0.
    0           magic: 0x50444703, "PDG" and the version
    1           total bytes, a multiple of 4 below 2**31
    2           layout: CRC-32 of the bucket's tensors, its types and which owner's part this is, so
                that a message of another bucket or configuration is refused
    3           K, the number of entries
    4           checksum: sum mod 2**32, over all words w but this one, numbered i from 0, of
                mix(w ^ mix(i)); `mix` (arithmetic.h) is a bijection, so a change within any
                one word is found for certain, and others but for one in 2**32
    ceil(T/16)  flags: bit t of T: tensor t's gradient is not finite, and it has no entries;
                bit T + t: tensor t rests here, and has none either
    positions   int32: K words. int64: 2K words, the lower half first. elias_fano, if K > 0: with
                l = floor(log2(universe / K)), at least 0, the upper part, K + (universe >> l) + 1
                bits of which bit (position_i >> l) + i is set for each i from 0, in whole words;
                then the low part, K fields of l bits. Bit b of a part is bit b % 32 of its word
                b / 32. About 2 + l bits an entry.
    values      M = K * dim of 32, 16, 8, 4 or 64 bits, the first lowest in its word. float32,
                float16, float64 (the lower half first): IEEE. mxfp8, mxfp4: OCP Microscaling, E4M3
                and E2M1, sign highest; groups of 32 consecutive values share a scale.
    scales      mxfp8, mxfp4: ceil(M / 32) bytes E8M0: a group's values are codes * 2^(byte - 127),
                byte = floor(log2(largest magnitude)) - e_max + 127, at least 0; e_max is 8 or 2.
                Codes are rounded to the nearest, ties to even, and are at most 448 or 6.
Refused on arrival: what is not whole or not ours, another layout or checksum, positions that do not
ascend below the universe, numbers that are not finite, padding that is not 0.

Example: Codec(("a", "b"), (6, 10), value_dtype="mxfp4", index_coding="elias_fano"), positions
[1, 7, 15] (b's are 1 and 9), values [1.0, -0.4, 6.0]: 40 bytes. universe 16, K 3, hence l 2.
    50444703 00000028 b799a1f4 00000003 ce3c1708  header
    00000000                                      flags: neither gradient is bad
    00000025    bits 0 + 0, 1 + 1, 3 + 2: positions >> 2 are 0, 1, 3
    0000003d    fields 1, 3, 3
    00000792    codes 2 (1.0), 9 (-0.5), 7 (6.0)
    0000007f    2^0: floor(log2(6)) - 2 is 0

A gather joins the messages of all ranks end to end. Sources: parsimony_kernels/packing/ops.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgc.wire.entries import OWNER_BLOCK, Entries
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import (
    INDEX_CODINGS,
    VALUE_DTYPES,
    WIRE_DTYPES,
    MessageError,
    sections,
)
from parsimony_kernels.packing.uniting import Uniting, start_uniting
from parsimony_kernels.runtime.transfer import on_device


@dataclass(frozen=True)
class Codec:
    """The coding of one bucket, or of the part of it that one rank owns.

    names, numels: its tensors, in order; of a row-sparse one, the number of rows.
    dim: values of an entry. value_dtype: as which they travel, one of VALUE_DTYPES. dtype: what
    they are before and after, float32 or float64; then "float32" means exactly, in 8 bytes, and the
    others are rounded to by way of float32. owner, num_owners: whose part, of how many; 0 of 1 is
    all.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    dim: int = 1
    value_dtype: str = "float32"
    index_coding: str = "int32"
    owner: int = 0
    num_owners: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("value_dtype", self.value_dtype, VALUE_DTYPES),
            ("index_coding", self.index_coding, INDEX_CODINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value!r}; allowed: {', '.join(allowed)}")
        if self.index_coding == "int32" and sum(self.numels) > 2**31:
            raise ValueError(
                f"a bucket of {sum(self.numels)} positions is beyond index_coding 'int32' (at most "
                f"2**31); set index_coding to 'elias_fano' or 'int64'"
            )
        if not 0 <= self.owner < self.num_owners:
            raise ValueError(f"owner {self.owner}; allowed: 0 to {self.num_owners - 1}")

    @functools.cached_property
    def universe(self) -> int:
        """How many positions there are here: in the bucket, or in the owner's part."""
        num_blocks = -(-sum(self.numels) // OWNER_BLOCK)
        mine = len(range(self.owner, num_blocks, self.num_owners)) * OWNER_BLOCK
        has_last = num_blocks > 0 and (num_blocks - 1) % self.num_owners == self.owner
        return mine - (num_blocks * OWNER_BLOCK - sum(self.numels) if has_last else 0)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor's positions begin in the bucket."""
        return (0, *itertools.accumulate(self.numels[:-1]))

    @functools.cached_property
    def wire_dtype(self) -> str:
        """As what values are written: one of parsimony_kernels.packing.message.WIRE_DTYPES."""
        is_exact = self.value_dtype == "float32"
        return WIRE_DTYPES[-1] if is_exact and self.dtype == torch.float64 else self.value_dtype

    @functools.cached_property
    def layout(self) -> int:
        """The 32 bits by which messages of this codec are known; see the module's text."""
        part = (self.owner, self.num_owners)
        what = (self.names, self.numels, self.dim, self.wire_dtype, self.index_coding, part)
        return zlib.crc32(repr(what).encode())

    @functools.cached_property
    def exact(self) -> Codec:
        """Return the codec of the same entries with values as they are."""
        return dataclasses.replace(self, value_dtype="float32")

    def of_owner(self, owner: int, num_owners: int) -> Codec:
        """Return the codec of an owner's part (see to_owner). It refuses messages of others."""
        return _of_owner(self, owner, num_owners)

    def message_bytes(self, num_entries: int) -> int:
        """Return the exact length of a message of this many entries."""
        shape = self.universe, self.dim, self.index_coding, self.wire_dtype, 2 * len(self.names)
        return 4 * sections(num_entries, *shape).end

    # ---- entries of tensors ----------------------------------------------------------------------

    def join(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Make positions (K,) and values (K * dim,) of every tensor's (indices, values)."""
        if len(parts) != len(self.names):
            raise ValueError(f"entries of {len(parts)} tensors; allowed: {len(self.names)}, all")
        if len(parts) == 1:
            return parts[0][0].long(), parts[0][1]
        pairs = zip(parts, self.offsets, strict=True)
        positions = [indices.long() + offset for (indices, _), offset in pairs]
        return torch.cat(positions), torch.cat([values for _, values in parts])

    def split(self, positions_K: Tensor, values_M: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor's (indices, values): the reverse of `join`. On a GPU, waits once."""
        if len(self.names) == 1:
            return [(positions_K, values_M)]
        starts = torch.searchsorted(positions_K, on_device(self.offsets, positions_K.device))
        starts = [*starts.tolist(), positions_K.numel()]
        return [
            (positions_K[begin:end] - offset, values_M[begin * self.dim : end * self.dim])
            for (begin, end), offset in zip(itertools.pairwise(starts), self.offsets, strict=True)
        ]

    # ---- messages --------------------------------------------------------------------------------

    def round_values(self, values_M: Tensor) -> Tensor:
        """Return what the receivers will decode of all values of a message, in its order.

        What rounding or cutting takes off is the caller's to keep in the residual. Values that are
        so rounded are not changed by another rounding. For float32: the same tensor.
        """
        return packing.round_values(values_M, self.wire_dtype)

    def encode(
        self,
        positions_K: Tensor,
        values_M: Tensor,
        bad: Iterable[int] = (),
        resting: Iterable[int] = (),
    ) -> Tensor:
        """Write one message (bytes,) uint8; see parsimony_kernels.packing.ops.pack.

        Args: positions_K: (K,) int64, ascending.
            values_M: (K * dim,) in the codec's dtype, finite; rounded here.
            bad: the numbers of the tensors whose gradient is not finite; they have no entries.
            resting: the numbers of those that rest; they have none either.
        """
        flags = [False] * (2 * len(self.names))
        for tensor in (*bad, *(len(self.names) + tensor for tensor in resting)):
            flags[tensor] = True
        return packing.pack(
            positions_K, values_M, universe=self.universe, dim=self.dim, layout=self.layout,
            index_coding=self.index_coding, value_dtype=self.wire_dtype, flags=flags,
        )  # fmt: skip

    def decode_one(self, message: Tensor) -> Entries:
        """Read one whole message. Raises: MessageError, saying what is wrong."""
        try:
            positions_K, values_M, flags = packing.unpack(
                message, universe=self.universe, dim=self.dim, layout=self.layout,
                index_coding=self.index_coding, value_dtype=self.wire_dtype,
                num_flags=2 * len(self.names),
            )  # fmt: skip
        except MessageError as error:
            raise MessageError(f"{error} (bucket of {self.names[0]}..., {self.value_dtype}, "
                               f"{self.index_coding})") from error  # fmt: skip
        return Entries(positions_K, values_M.to(self.dtype), *self.numbers_of(flags))

    def decode_any(self, message: Tensor) -> Entries:
        """Read a message of this codec, or of `exact`."""
        is_exact = packing.layout_of(message) == self.exact.layout
        return (self.exact if is_exact else self).decode_one(message)

    def split_messages(self, gathered: Tensor, num_messages: int) -> list[Tensor]:
        """Return the messages that are joined end to end; only their lengths are looked at.

        Raises: MessageError, naming the message. On a GPU, waits for each.
        """
        messages, offset = [], 0
        for number in range(num_messages):
            try:
                length = packing.first_length(gathered[offset:])
            except MessageError as error:
                raise MessageError(f"message {number}: {error}") from error
            messages.append(gathered[offset : offset + length])
            offset += length
        if offset != gathered.numel():
            raise MessageError(f"{gathered.numel() - offset} bytes follow the last message")
        return messages

    def start_uniting(
        self,
        messages: Tensor | Sequence[Tensor],
        num_messages: int,
        num_groups: int,
        offsets: Sequence[int] | None = None,
    ) -> Uniting | None:
        """Begin to read and add up, by group, messages that are joined end to end, on a GPU, which
        is not waited for. None where they are to be read one by one.

        messages: joined, or still to be. offsets: of the parts of sums; None: of the tensors.
        """
        if self.dtype == torch.float64:  # whose sums are float64, however values travel
            return None
        return start_uniting(
            messages, num_messages, num_groups, universe=self.universe, dim=self.dim,
            offsets=self.offsets if offsets is None else offsets, layout=self.layout,
            index_coding=self.index_coding, value_dtype=self.wire_dtype,
            num_flags=2 * len(self.names),
        )  # fmt: skip

    def numbers_of(self, flags: Sequence[bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what a message's flags say: the numbers of bad tensors, and of those at rest."""
        numbers = range(len(self.names))
        bad = tuple(t for t in numbers if flags[t])
        return bad, tuple(t for t in numbers if flags[len(self.names) + t])

    def decode(self, gathered: Tensor, num_messages: int) -> list[Entries]:
        """Read messages that are joined end to end. Raises: MessageError, naming the message."""
        found = []
        for number, message in enumerate(self.split_messages(gathered, num_messages)):
            try:
                found.append(self.decode_one(message))
            except MessageError as error:
                raise MessageError(f"message {number}: {error}") from error
        return found


@functools.lru_cache(maxsize=4096)
def _of_owner(codec: Codec, owner: int, num_owners: int) -> Codec:
    """Kept, because steps ask for the same ones, and their layout is a checksum of all names."""
    if codec.num_owners != 1:
        raise ValueError("an owner's part has no owners of its own")
    values = (codec.names, codec.numels, codec.dim, codec.value_dtype, codec.index_coding)
    return Codec(*values, owner, num_owners, codec.dtype)
