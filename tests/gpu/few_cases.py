"""One case of each kernel, for compute-sanitizer to watch: python -m tests.gpu.few_cases.

With --emulated: on the CPU, by tests/emulation.
"""

import contextlib
import sys

import torch

from benchmarks.gpu.common import emulated
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.step import device
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.buffers import test_device as test_device_buffers
from tests.unit.parsimony_kernels.cases import Case
from tests.unit.parsimony_kernels.step import test_device_observe

KINDS = [("velocity", "cover"), ("full", "cover I"), ("none", "factored"), ("table", "table 3")]


def run_a_few(where: torch.device) -> None:
    for (first, second), mode in ((kind, mode) for kind in KINDS for mode in cases.MODES):
        cases.check_steps(Case(first, second, mode, (65, 150)), device, where)
    for second in ("full", "cover", "cover I", "factored", "table 3"):
        test_device_observe.check_observe(Case("none", second, "dense", (65, 150)), 0.5, where)
    for case in test_device_buffers.SIZE_CASES:
        test_device_buffers.check_accumulate(case, where)
    for dtype in buffers.DTYPES:
        test_device_buffers.check_select(dtype, 1000, where)


if __name__ == "__main__":
    on_cpu = "--emulated" in sys.argv
    with emulated() if on_cpu else contextlib.nullcontext():
        run_a_few(torch.device("cpu") if on_cpu else torch.device("cuda", 0))
