"""The CUDA source, run on the CPU by tests/emulation, against the specification."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parsimony_kernels.runtime import launch as launch_cupy
from parsimony_kernels.runtime import launches
from parsimony_kernels.step import arguments, device
from tests.emulation.emulator import BACKWARD, FORWARD, WATCHED
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import Case

SHUFFLED = 7
ORDERED = [
    Case("none", "cover", "dense", (1025, 40)),
    Case("velocity", "cover", "rows", (100, 129), torch.bfloat16),
    Case("none", "cover", "dense", (200, 150)),
    Case("full", "cover I", "dense", (200, 150)),
    Case("none", "cover", "elements", (300, 24)),
    Case("none", "cover I", "elements", (31, 129)),
    Case("none", "factored", "dense", (300, 150)),
    Case("none", "factored", "rows", (1000, 24)),
    Case("none", "factored", "elements", (33, 40)),
    Case("table", "table 3", "dense", (65, 40), width=2),
    Case("table", "table 2", "elements", (65, 40), width=2),
    Case("table", "cover", "dense", (33, 129)),
]


@pytest.fixture
def striding(monkeypatch):
    """Make threads take many rows and blocks many tiles, as only large tensors do otherwise."""
    monkeypatch.setattr(arguments, "WANTED_TILES", 6)
    monkeypatch.setattr(launches, "MAX_BLOCKS", 3)  # and 2 tiles across: blocks change columns


@pytest.mark.one_in(7)
@pytest.mark.parametrize("case", cases.step_cases(), ids=str)
def test_a_step_equals_the_reference(emulated, case):
    emulated()
    cases.check_steps(case, device)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("case", cases.sketch_cases(), ids=str)
def test_a_sketch_equals_the_reference(emulated, case):
    emulated()
    cases.check_sketch(case, device)


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_threads_that_take_many_rows_and_blocks_many_tiles(emulated, striding, case):
    for order in (FORWARD, BACKWARD, SHUFFLED):
        emulated(order)
        cases.check_steps(case, device)


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_the_order_of_threads_and_blocks_reaches_no_result(emulated, case):
    results = []
    for order in (FORWARD, BACKWARD, SHUFFLED):
        emulated(order)
        results.append(cases.final_bits(case, device))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


def test_an_sm3_step_is_one_pass_over_the_parameter(emulated):
    emulator = emulated()
    cases.final_bits(Case("none", "cover", "dense", (33, 40)), device)
    assert emulator.launches == {
        name: cases.NUM_STEPS for name in ("step_cover_f32", "cover_store")
    }


@pytest.mark.parametrize("shape", [(1, 1), (2**31 - 1, 1), (1, 2**33), (50_000, 1500), (7, 97)])
def test_tiles_cover_every_row_and_column_once(shape):
    tiling = device.Tiling(*shape)
    width = tiling.lanes * launch_cupy.COLUMNS
    height = launch_cupy.THREADS // tiling.lanes * tiling.rows_per_thread
    down, rest = divmod(tiling.num_tiles, tiling.across)
    assert rest == 0
    assert 0 <= tiling.across * width - shape[1] < width
    assert 0 <= down * height - shape[0] < height


def test_elements_beyond_32_bits(emulated):
    emulated()
    cases.check_far_entries(device)


@pytest.mark.long
def test_nothing_is_touched_outside_its_tensor():
    """The tests above again, with every allocation watched by AddressSanitizer."""
    if os.environ.get(WATCHED):
        pytest.skip("this is that run")
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    options = "detect_leaks=0,detect_stack_use_after_return=0,use_sigaltstack=0"
    environment = {"LD_PRELOAD": str(library), "ASAN_OPTIONS": options, WATCHED: "1"}
    words = [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", __file__]
    words += ["-k", "equals_the_reference or many_rows"]
    result = subprocess.run(
        words, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


# ---- the emulation itself ------------------------------------------------------------------------


def test_the_emulation_notices_missing_barriers(emulated):
    case = Case("none", "cover", "dense", (1025, 40))
    emulated(SHUFFLED, flags=("-DWITHOUT_BARRIERS",))
    with pytest.raises(AssertionError, match="differ"):
        cases.check_steps(case, device)


@pytest.mark.parametrize("kernel", ["leaves_before_barrier", "leaves_before_shuffle"])
def test_the_emulation_notices_threads_that_leave_others_waiting(emulated, kernel):
    emulator = emulated()
    with pytest.raises(AssertionError, match="left"):
        emulator.launch(kernel, 1, device.Query(), torch.device("cpu"))
    cases.check_steps(Case("none", "cover", "dense", (33, 40)), device)  # and goes on afterwards
