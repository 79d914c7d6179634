"""The CUDA kernels on a GPU against the specification on the CPU; tests/unit emulates the same."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Correction, Selection
from parsimony_kernels.buffers.ops import read_reports
from parsimony_kernels.runtime.operands import Rule
from parsimony_kernels.step import device, ops
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.buffers import test_buffers
from tests.unit.parsimony_kernels.buffers import test_device as test_device_buffers
from tests.unit.parsimony_kernels.cases import Case
from tests.unit.parsimony_kernels.step import test_device_observe

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    if os.environ.get("REQUIRE_GPU"):
        pytest.fail("REQUIRE_GPU is set and torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
REPEATED = [
    Case("velocity", "cover", "dense", (1025, 1500)),
    Case("none", "cover I", "elements", (1000, 300)),
    Case("none", "factored", "dense", (1025, 1500)),
    Case("none", "factored", "elements", (1000, 300)),
    Case("table", "table 3", "dense", (1025, 300), width=40),
]


@pytest.mark.parametrize("case", cases.step_cases(), ids=str)
def test_a_step_equals_the_reference(case):
    cases.check_steps(case, device, GPU)


@pytest.mark.parametrize("case", cases.sketch_cases(), ids=str)
def test_a_sketch_equals_the_reference(case):
    cases.check_sketch(case, device, GPU)


@pytest.mark.parametrize("scale", test_device_observe.SCALES)
@pytest.mark.parametrize("case", test_device_observe.observe_cases(), ids=str)
def test_observing_equals_the_reference(case, scale):
    test_device_observe.check_observe(case, scale, GPU)


@pytest.mark.parametrize(
    "case", [*test_buffers.storage_cases(), *test_device_buffers.SIZE_CASES], ids=str
)
def test_accumulate_equals_the_reference(case):
    test_device_buffers.check_accumulate(case, GPU)


@pytest.mark.parametrize("n", (*test_buffers.SIZES, 3_000_017))
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_selecting_equals_the_reference(dtype, n):
    test_device_buffers.check_select(dtype, n, GPU)


@pytest.mark.parametrize("n", (1500, 3_000_017))
def test_kernels_for_what_is_common_and_lagging_ones_equal_the_reference(n):
    test_device_buffers.check_own_kernels(n, GPU)
    test_device_buffers.check_lagging(n, GPU)


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_there_is_no_room_for_stays(dtype):
    test_device_buffers.check_overflow(dtype, 100_003, GPU)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_is_not_finite_stays_in_its_block(dtype, bad):
    test_device_buffers.check_not_finite(dtype, bad, GPU)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_every_run_gives_the_same_bits(case):
    first = cases.final_bits(case, device, GPU)
    for _ in range(5):
        for a, b in zip(first, cases.final_bits(case, device, GPU), strict=True):
            assert torch.equal(a, b)


def test_a_step_waits_for_earlier_work_on_its_stream():
    param, grad = torch.zeros(33, 40, device=GPU), torch.zeros(33, 40, device=GPU)
    ops.step(param.clone(), grad, Rule(lr=0.5))  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        grad.fill_(1.0)
        ops.step(param, grad, Rule(lr=0.5))
    stream.synchronize()
    assert torch.equal(param.cpu(), torch.full((33, 40), -0.5))


@pytest.fixture
def waiting_is_an_error():
    """Return a function from whose call on torch refuses to wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("second", cases.SECONDS[1:])
def test_nothing_waits_while_gradients_are_taken_in(second, waiting_is_an_error):
    run = cases._Run(Case("none", second, "dense", (33, 40)), device, GPU)
    grad, scale = torch.ones(33, 40, device=GPU), torch.ones(1, device=GPU)
    residual = torch.zeros(33 * 40, device=GPU)
    for is_compiled in (False, True):
        if is_compiled:
            waiting_is_an_error()
        ops.observe(grad, Rule(lr=0.1), run.second, scale=scale)
        found = buffers.accumulate(
            grad.view(-1), Correction(), residual=residual, old_residual=residual, scale=scale,
            selection=Selection(math.inf, 10),
        )  # fmt: skip
    torch.cuda.set_sync_debug_mode("default")
    assert found.largest.item() == 1.0 and (residual == 2.0).all()


def test_ops_choose_cuda_for_tensors_on_a_gpu():
    values, rows = torch.randn(33, 40), torch.arange(33)
    there, here = (cases.table(torch.zeros(3, 7, 40, device=d), True) for d in (GPU, "cpu"))
    ops.sketch_insert(there, rows.to(GPU), values.to(GPU))
    with ops.use("reference"):
        ops.sketch_insert(here, rows, values)
        expected = ops.sketch_query(here, rows)
    assert torch.equal(ops.sketch_query(there, rows.to(GPU)).cpu(), expected)


def test_elements_beyond_32_bits():
    if torch.cuda.get_device_properties(GPU).total_memory < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GiB")
    cases.check_far_entries(device, GPU)


def test_buffers_beyond_32_bits():
    if torch.cuda.get_device_properties(GPU).total_memory < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GiB")
    n = 2**32 + 257
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, n - 1], device=GPU)
    grad = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
    grad[places] = 1.0
    residual = buffers.empty(n, "int8", GPU)
    found = buffers.accumulate(
        grad, Correction(), residual=residual, old_residual=None, selection=Selection(0.5, 10)
    )
    assert torch.equal(found.entries(read_reports([found])[0].count)[0], places)


def test_compute_sanitizer_finds_nothing():
    """memcheck, and racecheck for the shared memory of blocks."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH")
    for tool in ("memcheck", "racecheck", "synccheck"):
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        words += [sys.executable, "-m", "tests.gpu.few_cases"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
