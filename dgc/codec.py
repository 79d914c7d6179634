"""Entries to bytes and back: one message holds the chosen entries of a bucket's tensors.

Message, version 2, native byte order, every part starting at a multiple of 8 bytes:
    header     4 x int32: magic + version, total bytes, layout, number of entries K
    counts     T x int32: entries of each tensor, in the bucket's order; -1: its gradient is not
               finite, and it has no entries
    indices    K x int32 or int64: positions in each flattened tensor, ascending
    values     K x float16 or float32
`layout` is a checksum of the bucket's tensors and the two types, so that a message of another
bucket or another configuration is refused. A gather joins the messages of all ranks end to end.
Refuses: a message that is not whole, not ours, or that points outside its tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgc.sparsify import SparseGrad

_MAGIC = 0x50_44_47_02  # "PDG", version 2
_HEADER_BYTES = 16

VALUE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
INDEX_DTYPES = {"int32": torch.int32, "int64": torch.int64}


class MessageError(ValueError):
    """A received buffer is not a message that this codec wrote for this bucket."""


@dataclass(frozen=True)
class Codec:
    """The coding of one bucket. names and numels: its tensors, in order."""

    names: tuple[str, ...]
    numels: tuple[int, ...]
    value_dtype: str = "float32"
    index_dtype: str = "int32"

    def __post_init__(self) -> None:
        largest = max(self.numels)
        if self.index_dtype == "int32" and largest > 2**31:
            raise ValueError(
                f"a tensor of {largest} elements is beyond index_dtype 'int32' (at most 2**31); "
                f"set index_dtype to 'int64'"
            )

    @property
    def _layout(self) -> int:
        text = repr((self.names, self.numels, self.value_dtype, self.index_dtype))
        return zlib.crc32(text.encode()) & 0x7FFFFFFF

    def round_values(self, values: Tensor) -> Tensor:
        """Return what the receivers will decode: values beyond float16's range are cut to it.

        What rounding or cutting takes off is the caller's to keep in the residual.
        """
        dtype = VALUE_DTYPES[self.value_dtype]
        if dtype == torch.float32:
            return values
        limit = torch.finfo(dtype).max
        return values.clamp(-limit, limit).to(dtype).float()

    def encode(self, grads: Sequence[SparseGrad | None]) -> Tensor:
        """Write one message, uint8, a multiple of 8 bytes.

        Args: grads: of each tensor; None if its gradient is not finite.
        """
        sent = [grad for grad in grads if grad is not None]
        device = sent[0].values.device if sent else torch.device("cpu")
        none = torch.zeros(0, dtype=torch.int64, device=device)
        indices = torch.cat([none, *(g.indices for g in sent)]).to(INDEX_DTYPES[self.index_dtype])
        values = torch.cat([none.float(), *(g.values for g in sent)])
        values = values.to(VALUE_DTYPES[self.value_dtype])
        counts = [-1 if grad is None else grad.indices.numel() for grad in grads]
        total = self._message_bytes(indices.numel())
        header = torch.tensor(
            [_MAGIC, total, self._layout, indices.numel(), *counts], dtype=torch.int32
        )
        message = torch.zeros(total, dtype=torch.uint8, device=device)
        offset = 0
        for part in (header.to(device), indices, values):
            part_bytes = part.view(torch.uint8)
            message[offset : offset + part_bytes.numel()] = part_bytes
            offset += _padded(part_bytes.numel())
        return message

    def decode(self, gathered: Tensor, world_size: int) -> list[list[SparseGrad | None]]:
        """Split joined messages into each rank's entries, values as float32.

        A tensor whose gradient was not finite there is None.
        Raises: MessageError, saying what is wrong and where.
        """
        ranks: list[list[SparseGrad | None]] = []
        offset = 0
        for rank in range(world_size):
            message = gathered[offset:]
            total, counts = self._read_header(message, f"message of rank {rank}")
            ranks.append(self._read_entries(message[:total], counts, f"message of rank {rank}"))
            offset += total
        if offset != gathered.numel():
            raise MessageError(f"{gathered.numel() - offset} bytes follow the last message")
        return ranks

    def _message_bytes(self, num_entries: int) -> int:
        return (
            _padded(_HEADER_BYTES + 4 * len(self.names))
            + _padded(num_entries * INDEX_DTYPES[self.index_dtype].itemsize)
            + _padded(num_entries * VALUE_DTYPES[self.value_dtype].itemsize)
        )

    def _read_header(self, message: Tensor, where: str) -> tuple[int, list[int]]:
        num_bytes = _HEADER_BYTES + 4 * len(self.names)
        if message.numel() < num_bytes:
            raise MessageError(f"{where}: {message.numel()} bytes, its header needs {num_bytes}")
        magic, total, layout, num_entries, *counts = message[:num_bytes].view(torch.int32).tolist()
        if magic != _MAGIC:
            raise MessageError(f"{where}: starts with {magic:#x}, not {_MAGIC:#x} (version 2)")
        if layout != self._layout:
            raise MessageError(
                f"{where}: written for other tensors or types than {self.names[0]}... "
                f"({self.value_dtype}, {self.index_dtype}); the ranks' settings differ"
            )
        for count, numel in zip(counts, self.numels, strict=True):
            if not -1 <= count <= numel:
                raise MessageError(f"{where}: {count} entries for a tensor of {numel} elements")
        if sum(max(0, count) for count in counts) != num_entries or total != self._message_bytes(
            num_entries
        ):
            raise MessageError(f"{where}: its counts and its length of {total} bytes disagree")
        if message.numel() < total:
            raise MessageError(f"{where}: {message.numel()} bytes of {total}")
        return total, counts

    def _read_entries(
        self, message: Tensor, counts: list[int], where: str
    ) -> list[SparseGrad | None]:
        sizes = [max(0, count) for count in counts]
        num_entries = sum(sizes)
        index_dtype, value_dtype = INDEX_DTYPES[self.index_dtype], VALUE_DTYPES[self.value_dtype]
        start = _padded(_HEADER_BYTES + 4 * len(self.names))
        indices = _read(message, start, num_entries, index_dtype).long()
        start += _padded(num_entries * index_dtype.itemsize)
        values = _read(message, start, num_entries, value_dtype).float()
        parts = zip(values.split(sizes), indices.split(sizes), self.numels, strict=True)
        grads = [SparseGrad(*part) for part in parts]
        if not all(_is_valid(grad) for grad in grads):
            raise MessageError(f"{where}: indices outside their tensor or not ascending")
        return [g if count >= 0 else None for g, count in zip(grads, counts, strict=True)]


def _is_valid(grad: SparseGrad) -> bool:
    """Tell whether indices ascend strictly within the tensor; then its two ends bound them all."""
    if grad.indices.numel() == 0:
        return True
    inside = (grad.indices[0] >= 0) & (grad.indices[-1] < grad.numel)
    return bool(inside & (grad.indices.diff() > 0).all())


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def _read(message: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    return message[start : start + count * dtype.itemsize].view(dtype)
