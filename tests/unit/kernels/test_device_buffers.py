"""The CUDA passes over residual and velocity, run on the CPU by tests/emulation, as specified."""

import ctypes
import dataclasses
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import buffers, device_buffers, reference_buffers
from kernels.operands import BLOCK, Correction
from tests.emulation.emulator import BACKWARD, FORWARD
from tests.unit.kernels.cases import CPU, Guarded
from tests.unit.kernels.test_buffers import (
    KEY,
    NESTEROV,
    SIZES,
    Case,
    assert_same_bits,
    numbers,
    old_and_new,
    storage_cases,
    stored,
)

SHUFFLED = 7
THRESHOLDS = (0.0, 0.3, 2.5, float("inf"), float("nan"))
SIZE_CASES = [
    Case(dtype, "in place", dtype, "in place", n, torch.float32, True, 1)
    for dtype in buffers.DTYPES
    for n in SIZES
]


# ---- the checks, also of tests/gpu ---------------------------------------------------------------


def accumulated(
    case: Case, implementation: ModuleType, where: torch.device, grad: Tensor | None = None
) -> list[Tensor]:
    """Return all that one accumulation leaves: the maximum, buffers, and the old ones."""
    guarded, kept = Guarded(where), []
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
    largest = implementation.accumulate(guarded.copy(grad), correction, *kept, scale, KEY)
    guarded.check()
    parts = [part for buffer in kept if buffer is not None for part in buffers.tensors(buffer)]
    return [part.cpu() for part in (largest, *parts)]


def check_accumulate(case: Case, where: torch.device = CPU) -> None:
    expected = accumulated(case, reference_buffers, CPU)
    for a, b in zip(accumulated(case, device_buffers, where), expected, strict=True):
        assert_same_bits(a, b)


def check_select(dtype: str, n: int, where: torch.device = CPU) -> None:
    here, guarded = stored(numbers(n), dtype), Guarded(where)
    there = guarded.buffer(here)
    largest = float(buffers.decode(here).abs().max())
    for threshold in (*THRESHOLDS, largest):
        actual = device_buffers.select_above(there, threshold).cpu()
        assert_same_bits(actual, reference_buffers.select_above(here, threshold))
    guarded.check()


def check_not_finite(dtype: str, bad: float, where: torch.device = CPU) -> None:
    """What is bad stays in its block, shows in the maximum, and nothing crashes."""
    case = Case(dtype, "in place", dtype, "in place", 1000, torch.float32, False, 1)
    grad = numbers(case.n)
    grad[[BLOCK + 1, BLOCK + 40]] = torch.tensor([-bad, bad])
    actual = accumulated(case, device_buffers, where, grad)
    expected = accumulated(case, reference_buffers, CPU, grad)
    torch.testing.assert_close(actual[0], torch.tensor([bad]), equal_nan=True)
    for a, b in zip(actual[1:], expected[1:], strict=True):
        first, last = (1, 2) if len(a) == 4 else (BLOCK, 2 * BLOCK)  # scales are one a block
        for part in (slice(0, first), slice(last, None)):
            assert_same_bits(a[part], b[part])
        if a.is_floating_point():
            assert_same_bits(a.isfinite(), b.isfinite())


# ---- emulated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*storage_cases(), *SIZE_CASES], ids=str)
def test_accumulate_equals_the_reference(emulated, case):
    emulator = emulated()
    check_accumulate(case)
    assert emulator.launches == {"accumulate": 1}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_select_above_equals_the_reference(emulated, dtype, n):
    emulated()
    check_select(dtype, n)


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_warps_take_many_blocks_in_any_order(emulated, monkeypatch, dtype, order):
    emulated(order)
    monkeypatch.setattr(device_buffers, "MAX_BLOCKS", 2)
    in_place = Case(dtype, "in place", dtype, "in place", 10_007, torch.bfloat16, True, 1)
    check_accumulate(in_place)
    check_accumulate(dataclasses.replace(in_place, old_residual="int8", old_velocity="none"))
    check_select(dtype, 10_007)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_is_not_finite_stays_in_its_block(emulated, dtype, bad):
    emulated()
    check_not_finite(dtype, bad)


def test_nan_is_above_infinity(emulated):
    emulated()
    grad, residual = torch.tensor([float("inf"), -float("nan"), 1.0]), torch.zeros(3)
    largest = device_buffers.accumulate(grad, Correction(), residual, None, None, None, None, KEY)
    assert largest.isnan().all()


def test_python_lays_structures_out_as_the_compiler_does(emulated):
    emulator = emulated()
    assert ctypes.sizeof(device_buffers.Accumulation) == emulator.size_of("accumulation")
    assert ctypes.sizeof(device_buffers.Selection) == emulator.size_of("selection")
