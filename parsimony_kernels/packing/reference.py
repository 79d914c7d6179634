"""The operations in plain torch: the specification, and the implementation for any device.

Bits lie one to an int64 on their way. ops.py has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parsimony_kernels.packing.message import (
    CHECKSUM_WORD,
    GROUP,
    INDEX_CODINGS,
    VALUE_BITS,
    VALUE_DTYPES,
    WIRE_DTYPES,
    Problem,
    Sections,
)
from parsimony_kernels.runtime.operands import state_dtype
from parsimony_kernels.step.reference_sketch import mix


class Element(NamedTuple):
    """An MX element: its bits behind the point, bias, largest code, that one's exponent."""

    mantissa: int
    bias: int
    largest: int
    e_max: int
    sign: int
    nan: int | None


_ELEMENTS = {
    VALUE_DTYPES.index("mxfp8"): Element(3, 7, 0x7E, 8, 0x80, 0x7F),
    VALUE_DTYPES.index("mxfp4"): Element(1, 1, 7, 2, 8, None),
}
_IEEE = {
    WIRE_DTYPES.index(name): getattr(torch, name) for name in ("float64", "float32", "float16")
}
_FLOAT16 = VALUE_DTYPES.index("float16")
_INT32, _INT64 = INDEX_CODINGS.index("int32"), INDEX_CODINGS.index("int64")
_FLOAT16_MAX = 65504.0


def round_values(values_M: Tensor, coding: int) -> Tensor:
    if coding == _FLOAT16:
        return _to_float16(values_M).float()
    element = _ELEMENTS[coding]
    return _decode(*_encode(values_M, element), element)


def pack(words: Tensor, parts: Sections, positions_K: Tensor, values_M: Tensor) -> int:
    """Write all but the header's other words and the flags; return what is wrong with positions."""
    problem = _order_problem(positions_K, parts.universe)
    if problem:
        return problem
    if parts.index_coding == _INT32:
        words[parts.indices : parts.values] = positions_K.to(torch.int32)
    elif parts.index_coding == _INT64:
        words[parts.indices : parts.values] = positions_K.view(torch.int32)
    else:
        upper, low = _coded(positions_K, parts)
        words[parts.indices : parts.low] = _join_bits(upper)
        words[parts.low : parts.values] = _join_bits(low)
    _pack_values(words, parts, values_M)
    words[CHECKSUM_WORD] = _signed(checksum(words))
    return 0


def unpack(words: Tensor, parts: Sections) -> tuple[Tensor, Tensor, int]:
    nothing = words.new_empty(0, dtype=torch.int64), words.new_empty(0, dtype=torch.float32)
    if _signed(checksum(words)) != int(words[CHECKSUM_WORD]):
        return *nothing, Problem.CHECKSUM
    positions_K, problem = _unpack_positions(words, parts)
    if problem:
        return *nothing, problem
    values_M, is_padding_zero = _unpack_values(words, parts)
    if not values_M.isfinite().all():
        return *nothing, Problem.NOT_FINITE
    return positions_K, values_M, 0 if is_padding_zero else Problem.PADDING


def merge(positions: Sequence[Tensor], values: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    if any(_order_problem(positions_K, 2**63 - 1) for positions_K in positions):
        raise ValueError("positions of a list that are negative or do not ascend")
    positions_U = torch.cat(list(positions)).unique()
    shape, where = (positions_U.numel(), dim), positions_U.device
    sums = torch.zeros(shape, dtype=values[0].dtype, device=where)
    for positions_K, values_M in zip(positions, values, strict=True):  # a list's are unique
        sums[torch.searchsorted(positions_U, positions_K)] += values_M.view(-1, dim)
    return positions_U, sums.view(-1)


def checksum(words: Tensor) -> int:
    """Return sum of mix(word ^ mix(index)) mod 2**32 over all words but the checksum's own."""
    indices = _up_to(words.numel(), words.device)
    terms = mix((words.long() & 0xFFFFFFFF) ^ mix(indices))
    terms[CHECKSUM_WORD] = 0
    return int(terms.sum()) & 0xFFFFFFFF


def _signed(word: int) -> int:
    return (word ^ 0x80000000) - 0x80000000


def _up_to(end: int, device: torch.device) -> Tensor:
    return torch.arange(end, dtype=torch.int64, device=device)


# ---- bits ----------------------------------------------------------------------------------------


def _join_bits(bits: Tensor) -> Tensor:
    """Make words (ceil(n / 32),) int32 of bits (n,) int64, the first lowest; 0 beyond them."""
    padded = bits.new_zeros(-(-bits.numel() // 32) * 32)
    padded[: bits.numel()] = bits
    joined = (padded.view(-1, 32) << _up_to(32, bits.device)).sum(1)
    return ((joined ^ 0x80000000) - 0x80000000).to(torch.int32)


def _split_bits(words: Tensor, width: int = 1) -> Tensor:
    """Return the fields of `width` bits that words consist of, as int64."""
    shifts = width * _up_to(32 // width, words.device)
    return ((words.long().view(-1, 1) >> shifts) & ((1 << width) - 1)).view(-1)


# ---- positions -----------------------------------------------------------------------------------


def _order_problem(positions_K: Tensor, universe: int) -> int:
    if positions_K.numel() == 0:
        return 0
    if not bool((positions_K[1:] > positions_K[:-1]).all()):
        return Problem.ORDER
    is_inside = int(positions_K[0]) >= 0 and int(positions_K[-1]) < universe
    return 0 if is_inside else Problem.OUTSIDE


def _coded(positions_K: Tensor, parts: Sections) -> tuple[Tensor, Tensor]:
    """Return the upper and the low bits of positions."""
    upper = positions_K.new_zeros(parts.num_upper_bits)
    ranks = _up_to(positions_K.numel(), positions_K.device)
    upper[(positions_K >> parts.low_bits) + ranks] = 1
    shifts = _up_to(parts.low_bits, positions_K.device)
    return upper, ((positions_K.view(-1, 1) >> shifts) & 1).view(-1)


def _unpack_positions(words: Tensor, parts: Sections) -> tuple[Tensor, int]:
    num_entries, low_bits = parts.num_entries, parts.low_bits
    coded = words[parts.indices : parts.values]
    if parts.index_coding == _INT32:
        positions_K = coded.long()
    elif parts.index_coding == _INT64:
        positions_K = coded.clone().view(torch.int64)  # a message's words may lie at half of one
    else:
        upper = _split_bits(words[parts.indices : parts.low])
        if int(upper.sum()) != num_entries:
            return upper, Problem.COUNT
        if bool(upper[parts.num_upper_bits :].any()):
            return upper, Problem.PADDING
        low = _split_bits(words[parts.low : parts.values])
        if bool(low[num_entries * low_bits :].any()):
            return low, Problem.PADDING
        high = upper.nonzero().view(-1) - _up_to(num_entries, words.device)
        shifts = _up_to(low_bits, words.device)
        fields = low[: num_entries * low_bits].view(num_entries, low_bits)
        positions_K = (high << low_bits) + (fields << shifts).sum(1)
    return positions_K, _order_problem(positions_K, parts.universe)


# ---- values --------------------------------------------------------------------------------------


def _to_float16(values_M: Tensor) -> Tensor:
    return values_M.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()


def _pack_values(words: Tensor, parts: Sections, values_M: Tensor) -> None:
    out = words[parts.values : parts.end].view(torch.uint8)
    if parts.value_coding in _IEEE:
        is_half = parts.value_coding == _FLOAT16
        coded = (_to_float16(values_M) if is_half else values_M).view(torch.uint8)
        out[: coded.numel()] = coded
        return
    codes, scales = _encode(values_M, _ELEMENTS[parts.value_coding])
    if parts.value_coding == VALUE_DTYPES.index("mxfp4"):
        codes = torch.cat([codes, codes.new_zeros(codes.numel() % 2)]).view(-1, 2)
        codes = codes[:, 0] | codes[:, 1] << 4
    out[: codes.numel()] = codes.to(torch.uint8)
    at = 4 * (parts.scales - parts.values)
    out[at : at + scales.numel()] = scales.to(torch.uint8)


def _unpack_values(words: Tensor, parts: Sections) -> tuple[Tensor, bool]:
    """Return the values, and whether what follows them is 0."""
    count, coding = parts.num_values, parts.value_coding
    coded = words[parts.values : parts.scales]
    bits = VALUE_BITS[WIRE_DTYPES[coding]]
    if coding in _IEEE:
        num_bytes, dtype = count * bits // 8, _IEEE[coding]
        given = coded.view(torch.uint8)
        numbers = given[:num_bytes].clone().view(dtype)  # a word is half of a float64's place
        return numbers.to(state_dtype(dtype)), not bool(given[num_bytes:].any())
    codes = _split_bits(coded, bits)
    scales = _split_bits(words[parts.scales : parts.end], 8)
    is_padding_zero = not bool(codes[count:].any() or scales[parts.num_groups :].any())
    values_M = _decode(codes[:count], scales[: parts.num_groups], _ELEMENTS[coding])
    return values_M, is_padding_zero


def _encode(values_M: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Return codes (M,) and scales (ceil(M / 32),), both int64."""
    count = values_M.numel()
    bits = values_M.view(torch.int32).long()
    magnitudes = bits.new_zeros(-(-count // GROUP) * GROUP)
    magnitudes[:count] = bits & 0x7FFFFFFF
    scales = ((magnitudes.view(-1, GROUP).amax(1) >> 23) - element.e_max).clamp_min(0)
    spread = scales.repeat_interleave(GROUP)[:count]
    scaled = values_M * _power_of_two(254 - spread)
    y = scaled.view(torch.int32).long() & 0x7FFFFFFF
    shift = 23 - element.mantissa
    odd = (y >> shift) & 1
    normal = (y + (1 << (shift - 1)) - 1 + odd >> shift) - (127 - element.bias << element.mantissa)
    unit = 127 + 24 - element.bias - element.mantissa << 23  # its last bit is a subnormal's
    unit_value = 2.0 ** (24 - element.bias - element.mantissa)
    subnormal = (scaled.abs() + unit_value).view(torch.int32).long() - unit
    codes = torch.where(y < 128 - element.bias << 23, subnormal, normal)
    sign = torch.where(bits < 0, element.sign, 0)
    return codes.clamp_max(element.largest) | sign, scales


def _decode(codes_M: Tensor, scales: Tensor, element: Element) -> Tensor:
    magnitude = codes_M & element.sign - 1
    shift = 23 - element.mantissa
    normal = (magnitude << shift) + (127 - element.bias << 23)
    normal = normal.to(torch.int32).view(torch.float32)
    subnormal = magnitude.float() * 2.0 ** (1 - element.bias - element.mantissa)
    x = torch.where(magnitude >> element.mantissa > 0, normal, subnormal)
    if element.nan is not None:
        x = x.masked_fill(magnitude == element.nan, float("nan"))
    x = x * _power_of_two(scales.repeat_interleave(GROUP)[: codes_M.numel()])
    return torch.where(codes_M >= element.sign, -x, x)


def _power_of_two(biased: Tensor) -> Tensor:
    """Return 2 ** (biased - 127); infinity for 255."""
    bits = torch.where(biased > 0, biased << 23, 0x400000)
    return bits.to(torch.int32).view(torch.float32)
