"""Where the parts of a message lie, and what may be wrong with one.

The format itself is described in dgc/wire/codec.py; abi.h has the same structures and numbers.
Shapes: K entries, each a position below `universe` and `dim` values; M = K * dim.
"""

from __future__ import annotations

import ctypes
from enum import IntFlag

INDEX_CODINGS = ("int32", "int64", "elias_fano")
VALUE_DTYPES = ("float32", "float16", "mxfp8", "mxfp4")
WIRE_DTYPES = (*VALUE_DTYPES, "float64")  # the last: "float32", exact, of a float64 tensor
VALUE_BITS = {"float32": 32, "float16": 16, "mxfp8": 8, "mxfp4": 4, "float64": 64}  # without scales

MAGIC = 0x50_44_47_03  # "PDG", version 3
HEADER_WORDS = 5
TOTAL_WORD, LAYOUT_WORD, COUNT_WORD, CHECKSUM_WORD = 1, 2, 3, 4
GROUP = 32  # consecutive values that share a scale
MAX_UNIVERSE = 2**62
NO_POSITION = 2**63 - 1  # behind all others, where lists have room left


class MessageError(ValueError):
    """A received buffer is not a message of this version, layout and content, whole and intact."""


class Problem(IntFlag):
    """What an implementation may find wrong in a message."""

    CHECKSUM = 1
    COUNT = 2
    ORDER = 4
    OUTSIDE = 8
    PADDING = 16
    NOT_FINITE = 32

    def in_words(self) -> str:
        """Name the gravest: one damage shows as many."""
        return next(text for problem, text in _WORDS.items() if problem & self)


_WORDS = {
    Problem.CHECKSUM: "its checksum is not that of its content",
    Problem.COUNT: "its positions are not as many as its header says",
    Problem.OUTSIDE: "positions outside what the bucket holds",
    Problem.ORDER: "positions that do not ascend",
    Problem.PADDING: "padding that is not 0",
    Problem.NOT_FINITE: "values that are infinite or NaN",
}


class Sections(ctypes.Structure):
    """Where a message's parts begin, in 32-bit words.

    indices: positions, or Elias-Fano's upper bits; low: its low bits; end: the message's length.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_entries", "num_values", "universe")),
        *((name, ctypes.c_int64) for name in ("indices", "low", "values", "scales", "end")),
        *((name, ctypes.c_int) for name in ("index_coding", "value_coding", "low_bits")),
    ]

    @property
    def num_upper_bits(self) -> int:
        return upper_length(self.num_entries, self.universe, self.low_bits)

    @property
    def num_groups(self) -> int:
        return -(-self.num_values // GROUP) if WIRE_DTYPES[self.value_coding][:2] == "mx" else 0


def sections(
    num_entries: int, universe: int, dim: int, index_coding: str, value_dtype: str, num_flags: int
) -> Sections:
    """Lay out a message. Raises: OverflowError where it would be 2**31 bytes or longer."""
    k, low_bits, low_words = num_entries, 0, 0
    if index_coding == "elias_fano":
        low_bits = (universe // k).bit_length() - 1 if universe > k > 0 else 0
        index_words = num_words(upper_length(k, universe, low_bits))
        low_words = num_words(k * low_bits)
    else:
        index_words = k * (2 if index_coding == "int64" else 1)
    value_words = num_words(k * dim * VALUE_BITS[value_dtype])
    scale_words = num_words(8 * -(-k * dim // GROUP)) if value_dtype[:2] == "mx" else 0
    indices = HEADER_WORDS + num_words(num_flags)
    values = indices + index_words + low_words
    end = values + value_words + scale_words
    if end >= 2**29:
        raise OverflowError(f"{k} entries need {4 * end} bytes; a message has fewer than 2**31")
    return Sections(
        k, k * dim, universe, indices, indices + index_words, values, values + value_words, end,
        INDEX_CODINGS.index(index_coding), WIRE_DTYPES.index(value_dtype), low_bits,
    )  # fmt: skip


def upper_length(num_entries: int, universe: int, low_bits: int) -> int:
    """Return how many bits Elias-Fano's upper part has."""
    return num_entries + (universe >> low_bits) + 1 if num_entries > 0 else 0


def num_words(num_bits: int) -> int:
    return -(-num_bits // 32)


def most_entries(
    num_bytes: int, universe: int, dim: int, index_coding: str, value_dtype: str
) -> int:
    """Return how many entries messages of this length together have at most, by the bits of one.

    Elias-Fano's positions have the fewer low bits the more entries there are, so a first bound
    gives a better one.
    """
    bits = dim * VALUE_BITS[value_dtype]
    if index_coding != "elias_fano":
        return 8 * num_bytes // (bits + (64 if index_coding == "int64" else 32))
    most = 8 * num_bytes // (bits + 1)
    for _ in range(2):
        low_bits = (universe // most).bit_length() - 1 if universe > most > 0 else 0
        most = 8 * num_bytes // (bits + 1 + low_bits)
    return most
