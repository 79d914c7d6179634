"""Messages and merges: plain Python loops = plain torch = C++."""

import itertools
import math
from fractions import Fraction
from types import ModuleType

import pytest
import torch

from parsimony_kernels.packing import host as host_packing
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing import reference as reference_packing
from parsimony_kernels.packing.message import GROUP, VALUE_DTYPES, MessageError
from parsimony_kernels.step import ops
from tests.unit.parsimony_kernels.cases import CPU, Guarded
from tests.unit.parsimony_kernels.plain_packing import (
    ELEMENTS,
    FLAGS,
    FLOAT_MAX,
    Case,
    bits_of,
    entries,
    nearest_code,
    numbers,
    packing_cases,
    plain_message,
    value_of_code,
)

IMPLEMENTATIONS = {"native": host_packing, "reference": reference_packing}


# ---- the checks, also of the emulated GPU and of tests/gpu ---------------------------------------


def check_packing(case: Case, module: ModuleType, where: torch.device = CPU) -> None:
    """Pack and unpack between sentinels: the words and values that the specification gives."""
    positions, values = entries(case)
    parts = case.sections()
    expected = torch.zeros(parts.end, dtype=torch.int32)
    assert reference_packing.pack(expected, parts, positions, values) == 0
    guarded = Guarded(where)
    there = guarded.copy(torch.zeros(parts.end, dtype=torch.int32))
    assert module.pack(there, parts, guarded.copy(positions), guarded.copy(values)) == 0
    guarded.check()
    assert torch.equal(there.cpu(), expected)
    found_positions, found_values, problems = module.unpack(there, parts)
    assert problems == 0 and torch.equal(found_positions.cpu(), positions)
    rounded = packing.round_values(guarded.copy(values), case.value_dtype)
    assert torch.equal(bits_of(found_values), bits_of(rounded))
    guarded.check()


def check_merge(module: ModuleType, num_lists: int, dim: int, where: torch.device = CPU) -> None:
    """Against sums in a dense tensor, list by list."""
    generator = torch.Generator().manual_seed(num_lists)
    for universe in (1, 40, 5000, 300_000):
        guarded, positions, values = Guarded(where), [], []
        dense, is_there = torch.zeros(universe, dim), torch.zeros(universe, dtype=torch.bool)
        for number in range(num_lists):
            count = 0 if number == 1 else min(universe, 700)
            chosen = torch.randperm(universe, generator=generator)[:count].sort().values
            numbers_ = torch.randn(count, dim, generator=generator) * 10.0 ** (number % 5)
            positions.append(guarded.copy(chosen))
            values.append(guarded.copy(numbers_.view(-1)))
            for i, position in enumerate(chosen.tolist()):
                dense[position] += numbers_[i]
            is_there[chosen] = True
        found, sums = module.merge(positions, values, dim)
        guarded.check()
        assert torch.equal(found.cpu(), is_there.nonzero().view(-1))
        assert torch.equal(bits_of(sums), bits_of(dense[is_there].view(-1)))


def check_order_of_sums(module: ModuleType, where: torch.device = CPU) -> None:
    far = torch.tensor([7, 2**40]).to(where)
    values = [torch.tensor([x, x]).to(where) for x in (1e8, 1.0, -1e8, 1.0)]
    positions, sums = module.merge([far] * 4, values, 1)
    assert positions.tolist() == far.tolist() and sums.tolist() == [1.0, 1.0]
    _, sums = module.merge([far] * 4, [values[i] for i in (0, 2, 1, 3)], 1)
    assert sums.tolist() == [2.0, 2.0]
    _, sums = module.merge([far], [torch.tensor([-0.0, 1.0]).to(where)], 1)
    assert bits_of(sums).tolist()[0] == 0


# ---- the specification, and C++ ------------------------------------------------------------------


@pytest.mark.parametrize("case", packing_cases(), ids=str)
def test_messages_are_those_of_plain_loops(case):
    positions, values = entries(case)
    expected = plain_message(case, positions, values)
    for implementation in ops.IMPLEMENTATIONS:
        with ops.use(implementation):
            packed = packing.pack(positions, values, **case.format, flags=FLAGS)
            assert packed.dtype == torch.uint8 and bytes(packed.tolist()) == expected
            found = packing.unpack(packed, **case.format, num_flags=len(FLAGS))
            assert torch.equal(found[0], positions) and found[2] == FLAGS
            rounded = packing.round_values(values, case.value_dtype)
            assert torch.equal(bits_of(found[1]), bits_of(rounded))


@pytest.mark.parametrize("case", packing_cases(), ids=str)
def test_nothing_is_written_outside(case):
    for module in IMPLEMENTATIONS.values():
        check_packing(case, module)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("value_dtype", ELEMENTS)
def test_rounding_is_to_the_nearest_code(value_dtype, implementation):
    """Every code, every middle of two, and their neighbours, beside a value that sets the scale."""
    mantissa, bias, largest, _ = ELEMENTS[value_dtype]
    codes = [float(value_of_code(c, mantissa, bias)) for c in range(largest + 1)]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(codes)]
    x = torch.tensor([*codes, *middles, codes[-1] * 1.07, codes[-1] * 1.14])
    x = torch.cat([x, x.nextafter(torch.tensor(1e9)), x.nextafter(torch.tensor(0.0))])
    x = torch.cat([x, -x])
    groups = torch.full((x.numel(), GROUP), codes[-1])
    groups[:, 5] = x
    for scale in (1.0, 2.0**-90, 2.0**100):
        with ops.use(implementation):
            rounded = packing.round_values((groups * scale).view(-1), value_dtype)
        for got, given in zip(rounded.view(-1, GROUP)[:, 5].tolist(), x.tolist(), strict=True):
            code = nearest_code(Fraction(given), value_dtype)
            assert abs(got) == float(value_of_code(code, mantissa, bias)) * scale
            assert math.copysign(1, got) == math.copysign(1, given)


def test_mxfp8_is_torchs_e4m3_times_a_power_of_two():
    values = numbers(4096)
    largest = values.view(-1, GROUP).abs().amax(1)
    exponent = (largest.double().log2().floor() - 8).clamp_min(-127)
    scale = torch.exp2(exponent).repeat_interleave(GROUP)
    scaled = (values.double() / scale).float().clamp(-448, 448)
    expected = scaled.to(torch.float8_e4m3fn).double() * scale
    for implementation in ops.IMPLEMENTATIONS:
        with ops.use(implementation):
            assert torch.equal(packing.round_values(values, "mxfp8").double(), expected)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_rounding_twice_is_rounding_once(value_dtype, implementation):
    with ops.use(implementation):
        for values in (numbers(1001), torch.zeros(40), torch.full((33,), FLOAT_MAX), numbers(0)):
            once = packing.round_values(values, value_dtype)
            assert once.isfinite().all()
            assert torch.equal(bits_of(packing.round_values(once, value_dtype)), bits_of(once))
    assert packing.round_values(values, "float32") is values


def test_float16_is_cut_to_its_range():
    values = torch.tensor([1e6, -1e30, 1e-12, 1.0, 65519.0])
    for implementation in ops.IMPLEMENTATIONS:
        with ops.use(implementation):
            rounded = packing.round_values(values, "float16").tolist()
        assert rounded == [65504.0, -65504.0, 0.0, 1.0, 65504.0]


@pytest.mark.parametrize(("value_dtype", "most"), [("mxfp8", 20.6), ("mxfp4", 16.6)])
def test_bits_of_an_entry_at_a_thousandth(value_dtype, most):
    case = Case(21_000, 21_000_000, "elias_fano", value_dtype)
    packed = packing.pack(*entries(case), **case.format, flags=FLAGS)
    assert 8 * packed.numel() / case.num_entries <= most


def test_what_pack_is_given_is_checked():
    good = {"positions_K": torch.tensor([1, 5]), "values_M": torch.ones(2), "universe": 6, "dim": 1}
    good |= {"index_coding": "elias_fano", "value_dtype": "mxfp8", "layout": 0, "flags": ()}
    packing.pack(**good)
    for complaint, change in (
        ("do not ascend", {"positions_K": torch.tensor([5, 5])}),
        ("outside", {"positions_K": torch.tensor([1, 6])}),
        ("outside", {"positions_K": torch.tensor([-1, 5])}),
        ("2 positions; allowed: at most 1", {"universe": 1}),
        ("positions is torch.int32", {"positions_K": torch.tensor([1, 5], dtype=torch.int32)}),
        ("values is torch.float16", {"values_M": torch.ones(2).half()}),
        ("2 values for 2 positions; allowed: 2 each", {"dim": 2}),
        ("dim is 0", {"dim": 0}),
        ("index_coding 'int8'; allowed: int32, int64", {"index_coding": "int8"}),
        ("value_dtype 'int8'; allowed: float32", {"value_dtype": "int8"}),
        ("allowed with int32: up to", {"universe": 2**31 + 1, "index_coding": "int32"}),
    ):
        for implementation in ops.IMPLEMENTATIONS:
            with ops.use(implementation), pytest.raises(ValueError, match=complaint):
                packing.pack(**good | change)


# ---- merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dim", (1, 3))
@pytest.mark.parametrize("num_lists", (1, 2, 5, 33))
def test_merging_is_adding_list_by_list(num_lists, dim, module):
    check_merge(module, num_lists, dim)


@pytest.mark.parametrize("module", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_sums_are_taken_in_the_order_of_the_lists(module):
    check_order_of_sums(module)


def test_lists_far_apart_are_merged_as_near_ones():
    generator = torch.Generator().manual_seed(0)
    positions = [
        torch.cat([torch.randint(2**62, (50,), generator=generator), torch.arange(9) * 2**40])
        .unique()
        for _ in range(20)
    ]  # fmt: skip
    values = [torch.randn(p.numel(), generator=generator) for p in positions]
    for a, b in zip(*(m.merge(positions, values, 1) for m in IMPLEMENTATIONS.values()),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_what_cannot_be_merged_is_refused(implementation):
    ones, nothing = torch.ones(2), torch.zeros(0)
    with ops.use(implementation):
        found = packing.merge([nothing.long()] * 2, [nothing] * 2)
        assert [part.numel() for part in found] == [0, 0]
        for positions in ([3, 3], [4, 3], [-1, 3]):
            with pytest.raises(ValueError, match="negative or do not ascend"):
                packing.merge([torch.tensor(positions)], [ones])
        with pytest.raises(ValueError, match="2 values for 2 positions of dim 2"):
            packing.merge([torch.tensor([1, 2])], [ones], 2)
        with pytest.raises(ValueError, match="0 lists of positions"):
            packing.merge([], [])


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("index_coding", ["int32", "elias_fano"])
def test_float64_values_travel_exactly_or_by_way_of_float32(index_coding, implementation):
    generator = torch.Generator().manual_seed(0)
    how = {"universe": 9000, "dim": 3, "index_coding": index_coding, "layout": 7}
    for count in (0, 1, 7, 100):
        positions = torch.randperm(9000, generator=generator)[:count].sort().values
        values = torch.randn(3 * count, dtype=torch.float64, generator=generator) * 1e60
        if count == 7:
            values = values * 1e-130  # among what float32 has no numbers for
        with ops.use(implementation):
            for value_dtype in ("float64", *VALUE_DTYPES):
                message = packing.pack(positions, values, value_dtype=value_dtype,
                                       flags=[True], **how)  # fmt: skip
                shifted = torch.cat([message.new_zeros(4), message])[4:]  # at half of a float64
                found = packing.unpack(shifted, value_dtype=value_dtype, num_flags=1, **how)
                rounded = packing.round_values(values, value_dtype)
                assert rounded.dtype == torch.float64 and rounded.isfinite().all()
                assert torch.equal(found[0], positions) and found[2] == (True,)
                assert torch.equal(found[1].double(), rounded)
            assert packing.round_values(values, "float64") is values
            assert packing.pack(positions, values, value_dtype="float64", flags=[False],
                                **how).numel() >= 24 * count  # fmt: skip
    with ops.use(implementation), pytest.raises(MessageError, match="infinite or NaN"):
        message = packing.pack(positions, values * math.inf, value_dtype="float64",
                               flags=[False], **how)  # fmt: skip
        packing.unpack(message, value_dtype="float64", num_flags=1, **how)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_float64_sums_are_float64_in_the_order_of_the_lists(implementation):
    positions = [torch.tensor([1, 4, 9]), torch.tensor([4]), torch.tensor([4, 8])]
    values = [torch.tensor(v, dtype=torch.float64) for v in ([1e20, 1.0, 2.0], [1e-9], [0.1, 3.0])]
    with ops.use(implementation):
        found, sums = packing.merge(positions, values)
        assert found.tolist() == [1, 4, 8, 9]
        assert sums.tolist() == [1e20, 0.0 + 1.0 + 1e-9 + 0.1, 3.0, 2.0]
        with pytest.raises(ValueError, match="values is torch.float32; allowed: torch.float64"):
            packing.merge(positions[:2], [values[0], values[1].float()])
