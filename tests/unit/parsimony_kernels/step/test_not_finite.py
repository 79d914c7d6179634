"""Gradients that are NaN, infinite or huge: every implementation has the specification's numbers.

Of each kind of state, and of estimates of every depth; what optimizers do with them is in
tests/unit/optim/test_not_finite.py.
"""

import itertools
import math
import random

import pytest
import torch

from parsimony_kernels.runtime.operands import Cover, Factored, Full, Rule
from parsimony_kernels.step import device, host, reference
from parsimony_kernels.step.observing import Observation, Observed
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import CPU, Case

BAD = (math.nan, math.inf, -math.inf, 2e19, 5e20)
MODULES = {"host": host, "device": device}
SIZES = ((33, 40), (65, 7), (5, 150))
BAD_STEP = 1  # of those from 0: one before it, for state, and one after


@pytest.fixture(params=MODULES)
def implementation(request, emulated):
    emulated()
    return MODULES[request.param]


def spoilt(case, step, bad):
    """Return what arrives in a step; in one of them one entry, not in a row of zeros, is bad."""
    gradient, positions = cases.arrivals(case, step)
    if step == BAD_STEP:
        gradient.view(-1)[gradient.numel() * 2 // 3] = bad
    return gradient, positions


def runs_of(case, implementation):
    return [cases._Run(case, module, CPU) for module in (reference, implementation)]


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_step_is_the_specification_s(implementation, mode):
    """Every kind of first and second moment; what is bad, sizes, types and rules by lot."""
    lots = random.Random(mode)
    firsts = (*cases.FIRSTS, "table 2", "table 5")
    for first, second in itertools.product(firsts, cases.SECONDS):
        rest = (lots.choice(kinds) for kinds in (SIZES, cases.DTYPES, tuple(cases.RULES)))
        case, bad = Case(first, second, mode, *rest), lots.choice(BAD)
        expected, actual = runs = runs_of(case, implementation)
        for step in range(BAD_STEP + 2):
            gradient, positions = spoilt(case, step, bad)
            for run in runs:
                run.step(gradient, positions)
            for name, tensor in expected.state.items():
                what = f"{case}, {bad}: {name}, step {step}"
                cases.assert_same(actual.state[name], tensor, what, case)


def test_observing_is_the_specification_s(implementation):
    lots = random.Random(0)
    rule = Rule(lr=0.1, **cases.AVERAGES)
    for second, bad in itertools.product(cases.SECONDS[1:], BAD):
        case = Case("none", second, "dense", lots.choice(SIZES), lots.choice(cases.DTYPES))
        expected, actual = runs = runs_of(case, implementation)
        scale = lots.choice((None, torch.tensor([0.37]), torch.tensor([4.0])))
        for step in range(BAD_STEP + 2):
            for run in runs:
                grad = spoilt(case, step, bad)[0]
                run.implementation.observe([Observation(Observed(run.second), grad, rule, scale)])
        for name, tensor in expected.state.items():
            cases.assert_same(actual.state[name], tensor, f"{case}, {bad}: {name}", case)


@pytest.mark.parametrize("signed", [True, False])
def test_a_sketch_is_the_specification_s(implementation, signed):
    """Of every depth; a NaN among an item's buckets is its estimate, infinity but a number."""
    for depth, bad in itertools.product(range(1, 6), BAD):
        results = []
        for module in (reference, implementation):
            generator = torch.Generator().manual_seed(depth)
            rows = torch.arange(40)
            sketch = cases.table(torch.zeros(depth, 12, 5), signed, seed=depth)
            values = torch.randn(40, 5, generator=generator).abs()
            values[7, 2], values[11, 3] = bad, -bad if signed else bad
            module.sketch_insert(sketch, rows, values)
            before = module.sketch_query(sketch, rows)
            module.sketch_update(sketch, rows, values.nan_to_num(1.0, 1.0, 1.0), 0.5, 0.3)
            results.append((before, sketch.values, module.sketch_query(sketch, rows)))
        for expected, actual in zip(*results, strict=True):
            assert cases.same_numbers(actual, expected), (depth, bad)
        buckets, _ = hash_rows(sketch, rows)
        shares = (buckets == buckets[:, 7:8]).any(0)
        if math.isnan(bad):
            assert torch.equal(before[:, 2].isnan(), shares)


def test_numerators_that_are_not_finite_are_neither_bounded_nor_made_0(implementation):
    """Only finite ones are: where nothing has been, and beyond the largest quotient."""
    numerators = torch.tensor([[math.nan, math.inf, -math.inf, 3.0, -1e38, 0.1]])
    rule = Rule(lr=-1.0, largest_quotient=0.7)
    for moment, expected in ((0.0, [math.nan, math.inf, -math.inf, 0.0, 0.0, 0.0]),
                             (4.0, [math.nan, math.inf, -math.inf, 0.7, -0.7, 0.05]),
                             (1e-30, [math.nan, math.inf, -math.inf, 0.7, -0.7, 0.7]),
                             (math.inf, [math.nan, math.nan, math.nan, 0.0, 0.0, 0.0]),
                             (math.nan, [math.nan] * 6)):  # fmt: skip
        for module in (reference, implementation):
            param, second = torch.zeros(1, 6), Full(torch.full((1, 6), moment))
            first = Full(numerators.clone())
            module.step(param, torch.zeros(1, 6), rule, first, second, None)
            torch.testing.assert_close(param, torch.tensor([expected]), equal_nan=True)


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_mean_that_is_not_finite_is_no_reason_to_divide_by_eps(implementation, mode):
    """Columns whose mean is infinite: an estimate of 0 would move the others by lr g / eps."""
    for bad in (math.nan, math.inf):
        case = Case("none", "factored", mode, (33, 40))
        for module in (reference, implementation):
            run = cases._Run(case, module, CPU)
            run.second.row.fill_(1.0), run.second.col.fill_(1.0)
            run.second.col[3] = bad
            before = run.param.clone()
            gradient, positions = cases.arrivals(case, 0)
            run.step(gradient, positions)
            arrived = torch.zeros_like(run.param, dtype=torch.bool)
            shared = arrived.view(-1) if mode == "elements" else arrived
            shared[slice(None) if positions is None else positions] = True
            assert run.param[arrived].isnan().all()
            assert torch.equal(run.param[~arrived], before[~arrived])


def test_squares_overflow_where_torch_s_do(implementation):
    """Whose addcmul multiplies by the gain first; and sums of them no earlier than in float64."""
    rule = Rule(lr=0.0, second_beta=0.5, second_gain=1e-3, second_forgetting=0.5)
    torch_s = torch.zeros(1).addcmul_(*torch.full((2, 1), 5e20), value=1e-3)
    assert torch_s.isfinite().all()
    n, m = 3, 200
    for module in (reference, implementation):
        kinds = {
            "full": Full(torch.zeros(n, m)),
            "cover": Cover(torch.zeros(n), torch.zeros(m)),
            "cover I": Cover(torch.zeros(n), torch.zeros(m), "I"),
            "factored": Factored(torch.zeros(n), torch.zeros(m)),
            "table": cases.table(torch.zeros(3, 50, m), signed=False),
        }
        for name, second in kinds.items():
            grad = torch.full((n, m), 5e20)
            module.observe([Observation(Observed(second), grad, rule, None)])
            for tensor in vars(second).values():
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    reached = tensor[tensor != 0]
                    torch.testing.assert_close(reached, torch_s.expand_as(reached), msg=name)
