"""Messages by plain Python loops, and the cases that every implementation is given."""

import bisect
import functools
import itertools
import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from parsimony_kernels.packing.message import (
    GROUP,
    INDEX_CODINGS,
    MAGIC,
    VALUE_DTYPES,
    Sections,
    sections,
)

COUNTS = (0, 1, 31, 32, 33, 1000)
UNIVERSES = (1, 2, 33, 2**20, 2**33, 2**62)
FLOAT_MAX = torch.finfo(torch.float32).max
LAYOUT = 0xDEADBEEF
FLAGS = (True, *[False] * 31, True)  # more than a word has
# (bits behind the point, bias, largest code, exponent of the largest)
ELEMENTS = {"mxfp8": (3, 7, 0x7E, 8), "mxfp4": (1, 1, 7, 2)}


@dataclass(frozen=True)
class Case:
    num_entries: int
    universe: int
    index_coding: str
    value_dtype: str
    dim: int = 1

    def __str__(self) -> str:
        size = f"{self.num_entries} of {self.universe}"
        return f"{size}-{self.index_coding}-{self.value_dtype}-dim {self.dim}"

    @property
    def format(self) -> dict:
        names = ("universe", "dim", "index_coding", "value_dtype")
        return {name: getattr(self, name) for name in names} | {"layout": LAYOUT}

    def sections(self) -> Sections:
        return sections(self.num_entries, self.universe, self.dim, self.index_coding,
                        self.value_dtype, len(FLAGS))  # fmt: skip


def packing_cases() -> list[Case]:
    """Every size with every coding; the types of values and dims take turns."""
    kinds = itertools.product(INDEX_CODINGS, UNIVERSES, COUNTS)
    turns = zip(itertools.cycle(VALUE_DTYPES), itertools.cycle((1, 1, 3)), strict=False)
    cases = []
    for (coding, universe, count), (dtype, dim) in zip(kinds, turns, strict=False):
        if count <= universe and (coding != "int32" or universe <= 2**31):
            cases.append(Case(count, universe, coding, dtype, dim))
    every = itertools.product((33, 1000), INDEX_CODINGS, VALUE_DTYPES, (1, 5))
    return cases + [Case(count, 2**16, *kinds) for count, *kinds in every]


def entries(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return positions, with both ends of the universe, and values of many sizes with zeros."""
    generator = torch.Generator().manual_seed(seed)
    k, universe = case.num_entries, case.universe
    if universe <= 2 * k:
        positions = torch.randperm(universe, generator=generator)[:k].sort().values
    else:
        found = torch.randint(universe, (2 * k + 9,), generator=generator).unique()
        found = found[torch.randperm(len(found), generator=generator)[:k]].sort().values
        positions = torch.cat([torch.tensor([0]), found[1:-1], torch.tensor([universe - 1])])
        positions = (positions if k > 1 else found).unique()
        assert len(positions) == k
    return positions, numbers(k * case.dim, seed)


def numbers(n: int, seed: int = 0) -> Tensor:
    """Values of many sizes; zeros, and in places what float32 has at its ends."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)
    values[torch.rand(n, generator=generator) < 0.1] = 0.0
    if n > 200:
        values[:GROUP] = 0.0
        values[GROUP : 2 * GROUP] *= 1e-40
        values[70], values[75], values[76], values[77] = FLOAT_MAX, -FLOAT_MAX, 1e-45, -1e-45
        values[100:130] *= 1e-36
    return values


def bits_of(values: Tensor) -> Tensor:
    return values.cpu().view(torch.int32)


# ---- in plain Python -----------------------------------------------------------------------------


def value_of_code(code: int, mantissa: int, bias: int) -> Fraction:
    exponent, fraction = code >> mantissa, code & (1 << mantissa) - 1
    if exponent:
        fraction += 1 << mantissa
    return Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - bias - mantissa)


def nearest_code(x: Fraction, value_dtype: str) -> int:
    """Return the nearest of all codes, of two the even one; the largest for what is beyond."""
    table = all_values(value_dtype)
    near = bisect.bisect_left(table, abs(x))
    codes = range(max(0, near - 1), min(near + 1, len(table)))
    return min(codes, key=lambda c: (abs(table[c] - abs(x)), c & 1))


@functools.cache
def all_values(value_dtype: str) -> list[Fraction]:
    mantissa, bias, largest, _ = ELEMENTS[value_dtype]
    return [value_of_code(code, mantissa, bias) for code in range(largest + 1)]


def plain_groups(values: list[float], value_dtype: str) -> tuple[list[int], list[int]]:
    """Return codes with signs, and scale bytes."""
    codes, scales = [], []
    for start in range(0, len(values), GROUP):
        group = values[start : start + GROUP]
        largest = max(map(abs, group))
        exponent = math.frexp(largest)[1] - 1 if largest else -1000
        scale = max(0, min(254, exponent - ELEMENTS[value_dtype][3] + 127))
        scales.append(scale)
        sign = 0x80 if value_dtype == "mxfp8" else 8
        for x in group:
            code = nearest_code(Fraction(x) / Fraction(2) ** (scale - 127), value_dtype)
            codes.append(code | (sign if math.copysign(1, x) < 0 else 0))
    return codes, scales


def plain_mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def in_words(bits: int, length: int) -> bytes:
    return bits.to_bytes(-(-length // 32) * 4, "little")


def plain_positions(positions: list[int], universe: int, index_coding: str) -> bytes:
    k = len(positions)
    if index_coding != "elias_fano":
        return struct.pack(f"<{k}{'i' if index_coding == 'int32' else 'q'}", *positions)
    if k == 0:
        return b""
    low_bits = 0
    while 2 ** (low_bits + 1) * k <= universe:
        low_bits += 1
    upper = low = 0
    for i, position in enumerate(positions):
        upper |= 1 << (position >> low_bits) + i
        low |= (position % 2**low_bits) << i * low_bits
    return in_words(upper, k + (universe >> low_bits) + 1) + in_words(low, k * low_bits)


def plain_values(values: list[float], value_dtype: str) -> bytes:
    if value_dtype == "float32":
        return struct.pack(f"<{len(values)}f", *values)
    if value_dtype == "float16":
        halves = b"".join(struct.pack("<e", max(-65504.0, min(65504.0, x))) for x in values)
        return halves + bytes(-len(halves) % 4)
    codes, scales = plain_groups(values, value_dtype)
    width = 8 if value_dtype == "mxfp8" else 4
    joined = sum(code << width * i for i, code in enumerate(codes))
    return in_words(joined, width * len(codes)) + bytes(scales) + bytes(-len(scales) % 4)


def seal(text: bytes) -> bytes:
    """Put the right checksum into a message."""
    words = struct.unpack(f"<{len(text) // 4}I", text)
    terms = (plain_mix(word ^ plain_mix(i)) for i, word in enumerate(words) if i != 4)
    return text[:16] + struct.pack("<I", sum(terms) & 0xFFFFFFFF) + text[20:]


def plain_message(case: Case, positions: Tensor, values: Tensor) -> bytes:
    body = plain_positions(positions.tolist(), case.universe, case.index_coding)
    body += plain_values(values.tolist(), case.value_dtype)
    flags = in_words(sum(flag << t for t, flag in enumerate(FLAGS)), len(FLAGS))
    total = 20 + len(flags) + len(body)
    head = struct.pack("<5I", MAGIC, total, LAYOUT, case.num_entries, 0)
    return seal(head + flags + body)


def to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0).byte()
