"""Numbers close to 0 where the caller has told its thread to make them 0: as on one thread."""

import pytest
import torch

from parsimony_kernels.buffers import host as host_buffers
from parsimony_kernels.buffers.operands import Correction, Pass
from parsimony_kernels.runtime.operands import Rule
from parsimony_kernels.step import host, reference
from parsimony_kernels.step.observing import Observation, Observed
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import CPU, Case

MOST = 5
SIZE = (500, 150)  # enough for several threads, and half of the rows, too
CASES = [
    *(
        Case("full", second, mode, SIZE, rule="sums", scale=2e-20)
        for second in ("full", "cover", "cover I", "factored", "table 3")
        for mode in ("dense", "rows")
    ),
    Case("table", "full", "dense", SIZE, rule="sums", scale=2e-20),
    Case("full", "none", "dense", SIZE, torch.float16, rule="sums", scale=1e-6),
    Case("full", "full", "dense", SIZE, torch.bfloat16, rule="sums", scale=2e-20),
]


@pytest.fixture
def flush():
    """Return what makes only this thread flush; OpenMP's others are there before, and keep theirs.

    None may be made while this one flushes: it would flush ever after.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(MOST)
    cases.final_bits(CASES[0], host)

    def switch(is_on):
        if not torch.set_flush_denormal(is_on):
            pytest.skip("this processor keeps denormal numbers")

    yield switch
    torch.set_flush_denormal(False)
    torch.set_num_threads(before)


def results(work):
    """Return what work() does on ever fewer threads."""
    found = []
    for count in (MOST, 2, 1):
        torch.set_num_threads(count)
        found.append(work())
    return found


def assert_same(found):
    for other in found[:-1]:
        for a, b in zip(found[-1], other, strict=True):
            assert cases.same_numbers(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_the_caller_s_on_any_number_of_threads(flush, case):
    kept = cases.final_bits(case, host)
    flush(True)
    found = results(lambda: cases.final_bits(case, host))
    assert_same(found)
    for a, b in zip(found[-1], cases.final_bits(case, reference), strict=True):
        cases.assert_same(a, b, str(case), case)
    flush(False)
    assert not all(map(cases.same_numbers, found[-1], kept)) or case.dtype == torch.float16
    for a, b in zip(kept, cases.final_bits(case, host), strict=True):
        assert cases.same_numbers(a, b)  # and afterwards all is as it was


def observed():
    case = Case("none", "full", "dense", SIZE, scale=2e-20)
    run = cases._Run(case, host, CPU)
    grad = cases.arrivals(case, 0)[0]
    host.observe([Observation(Observed(run.second), grad, Rule(lr=0.0), None)])
    return list(run.state.values())


def sketched():
    rows = torch.arange(SIZE[0])
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 2e-38
    sketch = cases.table(torch.zeros(3, 40, SIZE[1]), signed=True)
    host.sketch_update(sketch, rows, values, 0.5, 0.3)
    return sketch.values, host.sketch_query(sketch, rows)


def accumulated():
    n = SIZE[0] * SIZE[1]
    grad = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 2e-38
    residual, velocity = torch.zeros(n), torch.zeros(n)
    correction = Correction(0.9, 0.1, 1.0, 0.0)
    host_buffers.accumulate([Pass(grad, correction, residual, None, velocity, None, None, 0)])[0][0]
    return residual, velocity


@pytest.mark.parametrize("work", [observed, sketched, accumulated])
def test_so_is_whatever_else_threads_share(flush, work):
    kept = work()
    flush(True)
    found = results(work)
    assert_same(found)
    flush(False)
    assert not all(map(cases.same_numbers, found[-1], kept))
