"""The CUDA passes over residual and velocity, run on the CPU by tests/emulation, as specified."""

import dataclasses
import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor

from parsimony_kernels.buffers import device as device_buffers
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers import reference as reference_buffers
from parsimony_kernels.buffers.operands import BLOCK, Correction, Pass, Selection
from tests.emulation.emulator import BACKWARD, FORWARD
from tests.unit.parsimony_kernels.buffers.test_buffers import (
    GRAD_DTYPES,
    KEY,
    NESTEROV,
    SIZES,
    Case,
    assert_same_bits,
    found_parts,
    numbers,
    old_and_new,
    storage_cases,
    stored,
)
from tests.unit.parsimony_kernels.cases import CPU, PADDING, Guarded

SHUFFLED = 7
ALIGNED = 32
MOMENTUM = Correction(0.9, 1, 1, 0)
THRESHOLDS = (0.0, 0.3, 2.5, 1e3, float("inf"))
SIZE_CASES = [
    Case(dtype, "in place", dtype, "in place", n, torch.float32, True, 1)
    for dtype in buffers.DTYPES
    for n in SIZES
]


# ---- the checks, also of tests/gpu ---------------------------------------------------------------


def accumulated(
    case: Case,
    implementation: ModuleType,
    where: torch.device,
    grad: Tensor | None = None,
    selection: Selection | None = None,
    padding: int = PADDING,
) -> list[Tensor]:
    """Return all that one accumulation leaves: report, lists, buffers, and the old ones."""
    guarded, kept = Guarded(where, padding), []
    for seed, dtype, old in (
        (1, case.residual, case.old_residual),
        (3, case.velocity, case.old_velocity),
    ):
        before, after = old_and_new(dtype, old, case.n, seed)
        after = guarded.buffer(after)
        kept += [after, after if old == "in place" else guarded.buffer(before)]
    if grad is None:
        grad = numbers(case.n, 5).clamp(-6e4, 6e4).to(case.grad)
    scale = guarded.copy(torch.tensor([0.37])) if case.scaled else None
    correction = NESTEROV if case.velocity else Correction(v_gain=1.3)
    given = (guarded.copy(grad), correction, *kept, scale, KEY, selection)
    found = implementation.accumulate([Pass(*given)])[0][0]
    guarded.check()
    parts = [part for buffer in kept if buffer is not None for part in buffers.tensors(buffer)]
    return [*found_parts(found), *(part.cpu() for part in parts)]


def check_accumulate(
    case: Case, where: torch.device = CPU, selection: Selection | None = None
) -> None:
    """Off boundaries of 16 bytes, and on them."""
    expected = accumulated(case, reference_buffers, CPU, None, selection)
    for padding in (PADDING, ALIGNED):
        actual = accumulated(case, device_buffers, where, None, selection, padding)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a, b)


def check_own_kernels(n: int, where: torch.device = CPU) -> None:
    """The kernels for what is common select as the one for all storage does."""
    selection = Selection(0.3, n, True, 2, 1)
    kinds = itertools.product(GRAD_DTYPES, buffers.DTYPES, (True, False))
    for grad, dtype, has_velocity in kinds:
        velocity = (dtype, "in place") if has_velocity else (None, "none")
        check_accumulate(Case(dtype, "in place", *velocity, n, grad, True, 1), where, selection)


def check_lagging(n: int, where: torch.device = CPU, grads=GRAD_DTYPES) -> None:
    """With a velocity of its own, and in the gradient's place."""
    for grad_dtype, lagged, padding in itertools.product(grads, (False, True), (PADDING, ALIGNED)):
        results = []
        for implementation, device in ((reference_buffers, CPU), (device_buffers, where)):
            guarded = Guarded(device, padding)
            residual, old_velocity = (guarded.copy(numbers(n, seed)) for seed in (1, 3))
            grad = guarded.copy(numbers(n, 5).clamp(-6e4, 6e4).to(grad_dtype))
            velocity = grad if grad_dtype == torch.float32 else guarded.copy(numbers(n, 7))
            given = (residual, residual, velocity, old_velocity)
            scale, selection = guarded.copy(torch.tensor([0.37])), Selection(0.3, n, True, 2, 1)
            found = implementation.accumulate(
                [Pass(grad, MOMENTUM, *given, scale, 0, selection, lagged, lags=True)]
            )[0][0]
            guarded.check()
            again = Selection(0.05, n, True, 2, 1)
            given = (None, Correction(), residual, residual, velocity, None, None, 0, again)
            more = implementation.accumulate([Pass(*given, lags=True)])[0][0]
            guarded.check()
            parts = (*found_parts(more), residual, velocity, old_velocity)
            results.append([*found_parts(found), *(part.cpu() for part in parts)])
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


def check_select(dtype: str, n: int, where: torch.device = CPU) -> None:
    """In a pass over a gradient, with and without velocity, and over what is stored."""
    for threshold in THRESHOLDS:
        for mask_velocity in (True, False):
            selection = Selection(threshold, n, mask_velocity, 3, 1)
            in_place = Case(dtype, "in place", dtype, "in place", n, torch.float32, True, 1)
            check_accumulate(in_place, where, selection)
            check_select_stored(dtype, n, selection, where)
        plain = Case(dtype, "bfloat16", None, "none", n, torch.float16, False, 1)
        check_accumulate(plain, where, Selection(threshold, n))


def check_select_stored(
    dtype: str, n: int, selection: Selection, where: torch.device = CPU
) -> None:
    results = []
    for implementation, device in ((reference_buffers, CPU), (device_buffers, where)):
        guarded = Guarded(device)
        residual, velocity = (guarded.buffer(stored(numbers(n, seed), dtype)) for seed in (1, 3))
        given = (None, Correction(), residual, residual, velocity, None, None, 0, selection)
        found = implementation.accumulate([Pass(*given)])[0][0]
        guarded.check()
        parts = [part.cpu() for b in (residual, velocity) for part in buffers.tensors(b)]
        results.append([*found_parts(found), *parts])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def check_overflow(dtype: str, n: int, where: torch.device = CPU) -> None:
    """The count is right, the list is full, what is in it is masked, and no more."""
    capacity = n // 4
    whole = stored(numbers(n, 1), dtype)
    guarded = Guarded(where)
    residual = guarded.buffer(whole)
    selection = Selection(0.0, capacity)
    given = (None, Correction(), residual, residual, None, None, None, 0, selection)
    found = device_buffers.accumulate([Pass(*given)])[0][0]
    guarded.check()
    before = buffers.decode(whole)
    report, indices, values, _ = found_parts(found)
    assert report[1] == (before != 0).sum() and len(indices) == capacity
    assert torch.equal(before[indices], values) and indices.unique().numel() == capacity
    assert (values != 0).all()
    expected = before.clone()
    expected[indices] = 0.0
    assert torch.equal(buffers.decode(residual).cpu(), expected)


def check_not_finite(dtype: str, bad: float, where: torch.device = CPU) -> None:
    """What is bad stays in its block, shows in the maximum, and nothing crashes."""
    case = Case(dtype, "in place", dtype, "in place", 1000, torch.float32, False, 1)
    grad = numbers(case.n)
    grad[[BLOCK + 1, BLOCK + 40]] = torch.tensor([-bad, bad])
    actual = accumulated(case, device_buffers, where, grad)
    expected = accumulated(case, reference_buffers, CPU, grad)
    largest = actual[0][:1].view(torch.float32)
    torch.testing.assert_close(largest, torch.tensor([bad]), equal_nan=True)
    for a, b in zip(actual[4:], expected[4:], strict=True):
        first, last = (1, 2) if len(a) == 4 else (BLOCK, 2 * BLOCK)  # scales are one a block
        for part in (slice(0, first), slice(last, None)):
            assert_same_bits(a[part], b[part])
        if a.is_floating_point():
            assert_same_bits(a.isfinite(), b.isfinite())


# ---- emulated ------------------------------------------------------------------------------------


@pytest.mark.one_in(7)
@pytest.mark.parametrize("case", [*storage_cases(), *SIZE_CASES], ids=str)
def test_accumulate_equals_the_reference(emulated, case):
    emulator = emulated()
    check_accumulate(case)
    assert emulator.launches == {"accumulate": 2}


@pytest.mark.parametrize("n", SIZES[:-1])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_selecting_equals_the_reference(emulated, dtype, n):
    emulator = emulated()
    check_select(dtype, n)
    own = "blocks" if dtype == "int8" else dtype
    assert emulator.launches == {
        f"accumulate_select_float32_{own}_velocity": 20,
        **{"accumulate_select": 10, "select_stored": 10},
    }
    check_lagging(n)


def test_what_is_common_has_kernels_of_its_own(emulated):
    emulator = emulated()
    check_own_kernels(1500)
    check_lagging(1500)
    names = {name for name in emulator.launches if name.startswith("accumulate")}
    assert len(names) == 1 + 2 * 6 + 3, names


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_there_is_no_room_for_stays(emulated, dtype, order):
    emulated(order)
    check_overflow(dtype, 4097)


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_warps_take_many_blocks_in_any_order(emulated, monkeypatch, dtype, order):
    emulated(order)
    monkeypatch.setattr(device_buffers, "MAX_BLOCKS", 2)
    in_place = Case(dtype, "in place", dtype, "in place", 10_007, torch.bfloat16, True, 1)
    check_accumulate(in_place)
    check_accumulate(dataclasses.replace(in_place, old_residual="int8", old_velocity="none"))
    check_accumulate(in_place, selection=Selection(0.3, 10_007, True, 2, 1))
    check_select_stored(dtype, 10_007, Selection(0.3, 10_007))
    check_lagging(10_007, grads=(torch.bfloat16,))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_is_not_finite_stays_in_its_block(emulated, dtype, bad):
    emulated()
    check_not_finite(dtype, bad)


def test_nan_is_above_infinity(emulated):
    emulated()
    grad, residual = torch.tensor([float("inf"), -float("nan"), 1.0]), torch.zeros(3)
    found = device_buffers.accumulate(
        [Pass(grad, Correction(), residual, None, None, None, None, KEY)]
    )[0][0]
    assert found.largest.isnan().all()


def test_indices_outside_of_a_buffer_are_refused():
    for wrong in ([-1, 2], [2, 300]):
        with pytest.raises(IndexError, match=r"allowed: 0\.\.299"):
            buffers.put(buffers.empty(300, "int8", CPU), torch.tensor(wrong), None, 0)
