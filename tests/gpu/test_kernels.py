"""The CUDA kernels on a GPU against the specification on the CPU; tests/unit emulates the same."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import device, ops
from kernels.ops import Rule
from tests.unit.kernels import cases
from tests.unit.kernels.cases import Case

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


def test_ops_choose_cuda_for_tensors_on_a_gpu():
    values, rows = torch.randn(33, 40), torch.arange(33)
    there, here = (cases.table(torch.zeros(3, 7, 40, device=d), True) for d in (GPU, "cpu"))
    ops.sketch_insert(there, rows.to(GPU), values.to(GPU))
    with ops.use("reference"):
        ops.sketch_insert(here, rows, values)
        expected = ops.sketch_query(here, rows)
    assert torch.equal(ops.sketch_query(there, rows.to(GPU)).cpu(), expected)


@pytest.mark.slow
def test_elements_beyond_32_bits():
    if torch.cuda.get_device_properties(GPU).total_memory < 30 * 2**30:
        pytest.skip("needs a GPU with 30 GiB")
    cases.check_far_entries(device, GPU)


def test_compute_sanitizer_finds_nothing():
    """memcheck, and racecheck for the shared memory of blocks."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on PATH")
    for tool in ("memcheck", "racecheck", "synccheck"):
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        words += [sys.executable, __file__]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def run_a_few() -> None:
    """What compute-sanitizer watches: one case of each kernel."""
    kinds = [("velocity", "cover"), ("full", "cover I"), ("none", "factored"), ("table", "table 3")]
    for (first, second), mode in ((kind, mode) for kind in kinds for mode in cases.MODES):
        cases.check_steps(Case(first, second, mode, (65, 150)), device, GPU)


if __name__ == "__main__":
    run_a_few()
