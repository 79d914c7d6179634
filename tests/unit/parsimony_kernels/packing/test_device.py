"""Messages and merges in CUDA, run on the CPU by tests/emulation: as specified, and safe."""


import pytest
import torch

from parsimony_kernels.packing import device as device_packing
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES, Problem
from parsimony_kernels.step import ops
from tests.emulation.emulator import BACKWARD, FORWARD
from tests.unit.parsimony_kernels.cases import Guarded
from tests.unit.parsimony_kernels.packing.test_damaged import check_damage, check_forged
from tests.unit.parsimony_kernels.packing.test_packing import (
    check_merge,
    check_order_of_sums,
    check_packing,
)
from tests.unit.parsimony_kernels.plain_packing import Case, bits_of, entries, packing_cases

SHUFFLED = 7


@pytest.fixture
def on_device(emulated, monkeypatch):
    """Return a function that lets packing.py run the device's implementation on CPU tensors."""

    def use(order=FORWARD):
        monkeypatch.setattr(packing, "implementing_module", lambda *_: device_packing)
        return emulated(order)

    return use


@pytest.mark.parametrize("case", packing_cases(), ids=str)
def test_packing_equals_the_reference(on_device, case):
    on_device()
    check_packing(case, device_packing)


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_threads_take_many_items_in_any_order(on_device, monkeypatch, value_dtype, order):
    on_device(order)
    monkeypatch.setattr(device_packing, "MAX_BLOCKS", 2)
    for index_coding in INDEX_CODINGS:
        check_packing(Case(3001, 2**20, index_coding, value_dtype), device_packing)
    check_merge(device_packing, 3, 5)


@pytest.mark.parametrize("dim", (1, 3))
@pytest.mark.parametrize("num_lists", (1, 2, 33))
def test_merging_is_adding_list_by_list(on_device, num_lists, dim):
    on_device()
    check_merge(device_packing, num_lists, dim)
    check_order_of_sums(device_packing)


@pytest.mark.parametrize("index_coding", INDEX_CODINGS)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_damaged_messages_are_errors(on_device, index_coding, value_dtype):
    on_device()
    for count in (0, 1, 37):
        check_damage(Case(count, 5000, index_coding, value_dtype), 70, first=100 * count)


def test_every_check_finds_what_a_right_checksum_hides(on_device):
    on_device()
    check_forged(ops.implementation())


@pytest.mark.parametrize("index_coding", INDEX_CODINGS)
def test_positions_that_no_bucket_has_are_packed_safely_and_refused(on_device, index_coding):
    """Nothing waits for a GPU when packing: whoever unpacks finds them."""
    on_device()
    case = Case(100, 5000, index_coding, "mxfp8")
    _, values = entries(case)
    generator = torch.Generator().manual_seed(0)
    for low, high in ((0, 5000), (-(2**40), 2**40), (4990, 5000), (10_000, 2**31 - 1)):
        guarded, parts = Guarded(torch.device("cpu")), case.sections()
        positions = torch.randint(low, high, (100,), generator=generator)
        words = guarded.copy(torch.zeros(parts.end, dtype=torch.int32))
        device_packing.pack(words, parts, guarded.copy(positions), values)
        guarded.check()
        problems = device_packing.unpack(words, parts)[2]
        assert problems and not problems & Problem.CHECKSUM


def test_equal_messages_have_equal_bits_in_any_order(on_device):
    case = Case(777, 2**20, "elias_fano", "mxfp4")
    packed = []
    for order in (FORWARD, BACKWARD, SHUFFLED):
        on_device(order)
        packed.append(packing.pack(*entries(case), **case.format, flags=()))
    assert all(torch.equal(bits_of(packed[0]), bits_of(other)) for other in packed)
