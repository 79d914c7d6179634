"""What is not a message is an error, and nothing else: in plain torch and in C++."""

import itertools
import struct

import pytest
import torch
from torch import Tensor

from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import INDEX_CODINGS, MAGIC, VALUE_DTYPES, MessageError
from parsimony_kernels.step import ops
from tests.unit.parsimony_kernels.cases import CPU, Guarded
from tests.unit.parsimony_kernels.plain_packing import (
    FLAGS,
    LAYOUT,
    Case,
    entries,
    plain_message,
    seal,
    to_tensor,
)

# ---- the checks, also of the emulated GPU and of tests/gpu ---------------------------------------


def damaged(text: bytes, other: bytes, seed: int) -> bytes:
    """Return a message that is not `text`: changed, cut, lengthened, made up, or another's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    result = bytearray(text)
    match seed % 7:
        case 0:
            for _ in range(1 + draw(4)):
                result[draw(len(result))] ^= 1 << draw(8)
        case 1:
            result = result[: draw(len(result))]
        case 2:
            result += bytes(draw(256) for _ in range(1 + draw(12)))
        case 3:
            a, b = 4 * draw(len(result) // 4), 4 * draw(len(result) // 4)
            result[a : a + 4], result[b : b + 4] = result[b : b + 4], result[a : a + 4]
        case 4:
            result = bytearray(draw(256) for _ in range(draw(200)))
        case 5:
            return other
        case 6:
            start = draw(len(result))
            for place in range(start, min(len(result), start + 1 + draw(40))):
                result[place] = draw(256)
    return bytes(result) if result != text else text[:-4]


def check_damage(case: Case, num_seeds: int, where: torch.device = CPU, first: int = 0) -> int:
    """Every damaged message is an error, and resealed ones are one or hold what messages may."""
    original = plain_message(case, *entries(case))
    others = [k + 1 for k in (case.num_entries,) if k < case.universe]
    elsewhere = Case(*(others or [0]), case.universe, case.index_coding, case.value_dtype, case.dim)
    other = plain_message(elsewhere, *entries(elsewhere))
    other = seal(other[:8] + struct.pack("<I", LAYOUT ^ 1) + other[12:])
    reading = {**case.format, "num_flags": len(FLAGS)}
    for seed in range(first, first + num_seeds):
        text = damaged(original, other, seed)
        there = Guarded(where).copy(to_tensor(text))  # also at an odd address
        with pytest.raises(MessageError):
            packing.unpack(there, **reading)
        if len(text) % 4 or len(text) < 20:
            continue
        try:
            resealed = to_tensor(seal(text)).to(where)
            positions, values, _ = packing.unpack(resealed, **reading)
        except MessageError:
            continue
        assert positions.numel() * case.dim == values.numel()
        assert values.isfinite().all() and (positions.diff() > 0).all()
        assert positions.numel() == 0 or 0 <= positions[0] <= positions[-1] < case.universe
    return num_seeds


# ---- what is not a message -----------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_damaged_messages_are_errors(implementation, is_long):
    wanted = 10_000 if is_long else 1_000
    kinds = list(itertools.product((0, 1, 37), INDEX_CODINGS, VALUE_DTYPES))
    num_seeds = -(-wanted // len(kinds))
    with ops.use(implementation):
        total = sum(
            check_damage(Case(count, 5000, *coding, dim), num_seeds, first=1000 * number)
            for number, ((count, *coding), dim) in enumerate(
                zip(kinds, itertools.cycle((1, 3)), strict=False)
            )
        )
    assert total >= wanted


def forged(case: Case, changes: dict[int, int]) -> Tensor:
    """A message whose words at these places are others, under the right checksum."""
    text = bytearray(plain_message(case, *entries(case)))
    for place, word in changes.items():
        place %= len(text) // 4
        text[4 * place : 4 * place + 4] = struct.pack("<I", word & 0xFFFFFFFF)
    return to_tensor(seal(bytes(text)))


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_every_check_finds_what_a_right_checksum_hides(implementation):
    check_forged(implementation)


def check_forged(implementation: str, where: torch.device = CPU) -> None:
    def case(index_coding: str, value_dtype: str, count: int = 3) -> Case:
        return Case(count, 5000, index_coding, value_dtype)

    plain, coded = case("int32", "float32"), case("elias_fano", "mxfp8")
    for where_from, changes, complaint in (
        (plain, {0: MAGIC - 1}, "not 0x50444703 .version 3"),
        (plain, {1: 24}, "of which its header says 24"),
        (plain, {2: 7}, "written for other tensors"),
        (plain, {3: -1}, "-1 entries; allowed: 0 to 5000"),
        (plain, {3: 5001}, "5001 entries"),
        (plain, {3: 2}, "2 entries need"),
        (plain, {6: 3}, "padding that is not 0"),
        (plain, {7: -5}, "outside"),
        (plain, {9: 5000}, "outside"),
        (plain, {8: 0}, "do not ascend"),
        (plain, {7: 9, 8: 8}, "do not ascend"),
        (plain, {10: 0x7F800000}, "infinite or NaN"),
        (plain, {10: 0xFFC00000}, "infinite or NaN"),
        (case("int64", "float32"), {8: 1}, "outside|ascend"),
        (case("int64", "float16"), {-2: 0x7C00}, "infinite or NaN"),
        (case("int64", "float16"), {-1: 0x00010000}, "padding that is not 0"),
        (coded, {7: 0}, "as many"),
        (coded, {7: -1}, "as many"),
        (coded, {7: 0x700}, "padding|outside"),
        (coded, {-3: -1}, "padding|ascend|outside"),
        (coded, {-2: 0x7F7F7F}, "infinite or NaN"),
        (coded, {-2: 0xFF}, "infinite or NaN"),
        (coded, {-1: 0xFF}, "infinite or NaN"),
        (coded, {-1: 0x0180}, "padding that is not 0"),
        (coded, {-2: 0x01000000}, "padding that is not 0"),
        (coded, {-2: 0x7E, -1: 0xFE}, "infinite or NaN"),
        (case("elias_fano", "mxfp4"), {-2: 0x1000}, "padding that is not 0"),
        (case("elias_fano", "mxfp4"), {-1: 0xFF}, "infinite or NaN"),
    ):
        text = forged(where_from, changes).to(where)
        with ops.use(implementation), pytest.raises(MessageError, match=complaint):
            packing.unpack(text, **where_from.format, num_flags=len(FLAGS))
