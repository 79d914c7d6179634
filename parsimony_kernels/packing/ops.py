"""Entries to messages, messages to entries, and the entries of many workers to their sums.

The format of a message is described in dgc/wire/codec.py. reference.py, host.py and device.py
agree to the bit. The first alone, whatever is chosen, has float64: values travel so exactly, or are
rounded by way of float32 to what is asked for.
Refuses, in `unpack`, whatever `pack` does not write; nothing outside a message is read.
Sources: Elias 1974 (J. ACM 21) and Fano 1971 for the positions, as Vigna 2013 (WSDM,
arXiv:1206.4300) lays them out; the OCP Microscaling Formats (MX) Specification v1.0 for mxfp8
(E4M3) and mxfp4 (E2M1).
Shapes: K entries, each a position and `dim` values; M = K * dim values in order; U positions that
at least one of the merged lists has.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from parsimony_kernels.packing.message import (
    COUNT_WORD,
    HEADER_WORDS,
    INDEX_CODINGS,
    LAYOUT_WORD,
    MAGIC,
    MAX_UNIVERSE,
    TOTAL_WORD,
    WIRE_DTYPES,
    MessageError,
    Problem,
    num_words,
    sections,
)
from parsimony_kernels.runtime.checks import check_tensor
from parsimony_kernels.runtime.choice import implementing_module
from parsimony_kernels.runtime.operands import STATE_DTYPES
from parsimony_kernels.runtime.transfer import upload


def round_values(values_M: Tensor, value_dtype: str) -> Tensor:
    """Return values (M,), in their dtype, as receivers will decode them: if that is value_dtype,
    this same tensor.

    float16 cuts to +-65504. In mxfp8 and mxfp4 every 32 values, in order, share a scale, so that a
    value's rounding depends on its neighbours: round all values of a message, in its order.
    Args: values_M: (M,) float32 or float64, finite.
    """
    _check_choice("value_dtype", value_dtype, WIRE_DTYPES)
    check_tensor("values", values_M, values_M.device, STATE_DTYPES, 1)
    if values_M.dtype == getattr(torch, value_dtype, None) or values_M.numel() == 0:
        return values_M
    narrow_M = _narrow(values_M, value_dtype)
    if value_dtype != "float32":
        narrow_M = _run(narrow_M).round_values(narrow_M, WIRE_DTYPES.index(value_dtype))
    return narrow_M.to(values_M.dtype)


def pack(
    positions_K: Tensor,
    values_M: Tensor,
    *,
    universe: int,
    dim: int,
    index_coding: str,
    value_dtype: str,
    layout: int,
    flags: Sequence[bool],
) -> Tensor:
    """Write one message (bytes,) uint8, a multiple of 4 bytes.

    Args: positions_K: (K,) int64, ascending and unique, in [0, universe).
        values_M: (K * dim,) float32 or float64, finite; rounded to value_dtype here.
        layout: 32 bits that the receiver must name too.
        flags: one for each tensor of the bucket.
    Raises: ValueError for arguments that are not so. On a GPU, where nothing here waits, wrong
        positions are found by those who unpack.
    """
    check_format(universe, dim, index_coding, value_dtype)
    device = positions_K.device
    check_tensor("positions", positions_K, device, (torch.int64,), 1)
    check_tensor("values", values_M, device, STATE_DTYPES, 1)
    values_M = _narrow(values_M, value_dtype)
    if values_M.numel() != positions_K.numel() * dim:
        raise ValueError(
            f"{values_M.numel()} values for {positions_K.numel()} positions; allowed: {dim} each"
        )
    num_entries = positions_K.numel()
    if num_entries > universe:
        raise ValueError(f"{num_entries} positions; allowed: at most {universe}, all there are")
    try:
        parts = sections(num_entries, universe, dim, index_coding, value_dtype, len(flags))
    except OverflowError as error:
        raise ValueError(
            f"{error}; use smaller buckets, a lower density, or fewer rows in a batch"
        ) from error
    words = torch.zeros(parts.end, dtype=torch.int32, device=device)
    head = [MAGIC, 4 * parts.end, layout, num_entries, 0, *_flag_words(flags)]
    head_words = torch.tensor(list(map(_signed, head)), dtype=torch.int32, device="cpu")
    words[: len(head)] = upload(head_words, device)
    problems = _run(values_M).pack(words, parts, positions_K, values_M)
    if problems:
        raise ValueError(f"positions must ascend within 0..{universe - 1}: there are "
                         f"{Problem(problems).in_words()}")  # fmt: skip
    return words.view(torch.uint8)


def unpack(
    message: Tensor,
    *,
    universe: int,
    dim: int,
    index_coding: str,
    value_dtype: str,
    layout: int,
    num_flags: int,
) -> tuple[Tensor, Tensor, tuple[bool, ...]]:
    """Return the positions (K,) int64, values (K * dim,) and flags of a message.

    Values are float64 if value_dtype is, else float32.

    Args: message: (bytes,) uint8, at any address.
    Raises: MessageError unless it is one that `pack` wrote with the same arguments. On a GPU this
        waits twice: for the header, and for what was found.
    """
    check_format(universe, dim, index_coding, value_dtype)
    head_words = HEADER_WORDS + num_words(num_flags)
    words = words_of(message)
    head = _read_head(words, head_words)
    num_entries, total = head[COUNT_WORD], 4 * words.numel()
    if _signed(layout) != head[LAYOUT_WORD]:
        raise MessageError("written for other tensors, or with other types, than are expected here")
    if not 0 <= num_entries <= universe:
        raise MessageError(f"{num_entries} entries; allowed: 0 to {universe}")
    try:
        parts = sections(num_entries, universe, dim, index_coding, value_dtype, num_flags)
    except OverflowError as error:
        raise MessageError(str(error)) from error
    if not head[TOTAL_WORD] == 4 * parts.end == total:
        raise MessageError(
            f"{total} bytes, of which its header says {head[TOTAL_WORD]}; "
            f"{num_entries} entries need {4 * parts.end}"
        )
    dtype = torch.float64 if value_dtype == "float64" else torch.float32
    module = implementing_module("packing", words.device.type, dtype)
    positions_K, values_M, problems = module.unpack(words, parts)
    flags = read_flags(head[HEADER_WORDS:], num_flags)
    if not problems & Problem.CHECKSUM and flags is None:
        problems |= Problem.PADDING
    if problems:
        raise MessageError(Problem(problems).in_words())
    return positions_K, values_M, flags


def first_length(buffer: Tensor) -> int:
    """Return the bytes of the first of the messages that are joined in `buffer`, by its header.

    Raises: MessageError where none begins, or less than all of it is there. Waits for a GPU.
    """
    head = _read_head(words_of(buffer[: 4 * HEADER_WORDS]), HEADER_WORDS)
    total = head[TOTAL_WORD]
    if not 4 * HEADER_WORDS <= total <= buffer.numel() or total % 4:
        raise MessageError(f"{buffer.numel()} bytes, where its header says {total}")
    return total


def layout_of(message: Tensor) -> int:
    """Return the layout that a message's header names. Raises: MessageError where there is none.

    Waits for a GPU.
    """
    return _read_head(words_of(message), HEADER_WORDS)[LAYOUT_WORD] & 0xFFFFFFFF


def merge(
    positions: Sequence[Tensor], values: Sequence[Tensor], dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the positions (U,) int64 of all lists, ascending, and their sums (U * dim,).

    Values at one position are added in the order of the lists, one by one, starting from 0, so that
    the sums are the same bits wherever the lists are the same.
    Args: positions: (K_p,) int64 each, ascending and unique, not negative; K_p may differ.
        values: (K_p * dim,) each, all float32 or all float64, as their sums are.
    Example: {2: 1.0, 5: 3.0} and {5: 1.0} -> [2, 5], [1.0, 4.0].
    Raises: ValueError; but for the order of positions, which on a GPU is the caller's to see to.
    Cost: on a GPU one wait, for U.
    """
    if len(positions) == 0 or len(positions) != len(values):
        raise ValueError(f"{len(positions)} lists of positions and {len(values)} of values")
    device = positions[0].device
    dtypes = (values[0].dtype,) if values[0].dtype in STATE_DTYPES else STATE_DTYPES
    for positions_K, values_M in zip(positions, values, strict=True):
        check_tensor("positions", positions_K, device, (torch.int64,), 1)
        check_tensor("values", values_M, device, dtypes, 1)
        if dim < 1 or values_M.numel() != positions_K.numel() * dim:
            raise ValueError(
                f"{values_M.numel()} values for {positions_K.numel()} positions of dim {dim}"
            )
    return _run(values[0]).merge(positions, values, dim)


# ---- headers and checks --------------------------------------------------------------------------


def words_of(message: Tensor) -> Tensor:
    """View a message as words (W,) int32; copied only if its address is not one of a word."""
    check_tensor("message", message, message.device, (torch.uint8,), 1)
    if message.numel() % 4:
        raise MessageError(f"{message.numel()} bytes; a message has a multiple of 4")
    if message.data_ptr() % 4 or message.storage_offset() % 4:
        message = message.clone()
    return message.view(torch.int32)


def _read_head(words: Tensor, num_words: int) -> list[int]:
    if words.numel() < num_words:
        raise MessageError(f"{4 * words.numel()} bytes; its header alone has {4 * num_words}")
    head = words[:num_words].tolist()
    if head[0] != MAGIC:
        raise MessageError(f"starts with {head[0] & 0xFFFFFFFF:#x}, not {MAGIC:#x} (version 3)")
    return head


def _flag_words(flags: Sequence[bool]) -> list[int]:
    words = [0] * num_words(len(flags))
    for i, flag in enumerate(flags):
        words[i // 32] |= bool(flag) << (i % 32)
    return words


def read_flags(words: Sequence[int], num_flags: int) -> tuple[bool, ...] | None:
    """Return the flags; None if others than these are set."""
    bits = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return None if bits >> num_flags else tuple(bool(bits >> i & 1) for i in range(num_flags))


def _signed(word: int) -> int:
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _check_choice(name: str, choice: str, allowed: tuple[str, ...]) -> None:
    if choice not in allowed:
        raise ValueError(f"{name} {choice!r}; allowed: {', '.join(allowed)}")


def check_format(universe: int, dim: int, index_coding: str, value_dtype: str) -> None:
    _check_choice("index_coding", index_coding, INDEX_CODINGS)
    _check_choice("value_dtype", value_dtype, WIRE_DTYPES)
    largest = 2**31 if index_coding == "int32" else MAX_UNIVERSE
    if not 0 <= universe <= largest:
        raise ValueError(f"a universe of {universe}; allowed with {index_coding}: up to {largest}")
    if dim < 1:
        raise ValueError(f"dim is {dim}; allowed: 1 or more")


_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def _narrow(values_M: Tensor, value_dtype: str) -> Tensor:
    """Return values in what they are coded from: float64 for float64, else float32, cut to it."""
    if value_dtype == "float64":
        return values_M.double()
    if values_M.dtype == torch.float32:
        return values_M
    return values_M.clamp(-_LARGEST_FLOAT32, _LARGEST_FLOAT32).float()


def _run(tensor: Tensor) -> ModuleType:
    return implementing_module("packing", tensor.device.type, tensor.dtype)
