"""The C++ kernels against the specification, and against themselves on more threads."""

import pytest
import torch

from parsimony_kernels.step import host
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import Case

THREADED = [
    Case("none", "cover", "dense", (1025, 40)),
    Case("velocity", "cover I", "dense", (700, 100)),
    Case("full", "factored", "dense", (1025, 100)),
    Case("none", "factored", "rows", (1025, 100)),
    Case("table", "table 3", "dense", (100, 1500)),
    Case("table", "cover", "dense", (100, 1500)),
    Case("none", "table 5", "rows", (257, 1500)),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", cases.step_cases(), ids=str)
def test_a_step_equals_the_reference(case):
    cases.check_steps(case, host)


@pytest.mark.parametrize("case", cases.sketch_cases(), ids=str)
def test_a_sketch_equals_the_reference(case):
    cases.check_sketch(case, host)


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_reaches_no_result(case, threads):
    threads(1)
    alone = cases.final_bits(case, host)
    for count in (2, 5):
        threads(count)
        for a, b in zip(alone, cases.final_bits(case, host), strict=True):
            assert torch.equal(a, b)


def test_elements_beyond_32_bits():
    cases.check_far_entries(host)
