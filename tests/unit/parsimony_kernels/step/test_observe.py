"""Feeding a second moment without a step: C++ as specified, and as a dense step feeds it."""

import itertools

import pytest
import torch

from parsimony_kernels.runtime.operands import Cover, Factored, Full, Rule
from parsimony_kernels.step import host, ops, reference
from parsimony_kernels.step.observing import Observation, Observed
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import Case

SECONDS = cases.SECONDS[1:]  # without "none"
SCALES = (None, 0.37)
SIZES = (*cases.SIZES, (300, 150))  # the last is enough for two threads


def observe_cases() -> list[Case]:
    """Every second moment of every size; types and rules take turns."""
    turns = zip(itertools.cycle(cases.DTYPES), itertools.cycle(cases.RULES), strict=False)
    kinds = itertools.product(SIZES, SECONDS)
    return [Case("none", second, "dense", size, *turn)
            for (size, second), turn in zip(kinds, turns, strict=False)]  # fmt: skip


def every_dtype() -> list[Case]:
    kinds = itertools.product(SECONDS, cases.DTYPES)
    return [Case("none", second, "dense", (300, 150), dtype) for second, dtype in kinds]


def observed(case: Case, implementation, scale: float | None = None) -> dict[str, torch.Tensor]:
    """Return the state, and a parameter that nobody was given, after a few gradients."""
    run = cases._Run(case, implementation, cases.CPU)
    rule = Rule(lr=0.1, **cases.RULES[case.rule])
    for step in range(cases.NUM_STEPS):
        grad = run.guarded.copy(cases.arrivals(case, step)[0])
        factor = None if scale is None else torch.tensor([scale])
        implementation.observe([Observation(Observed(run.second), grad, rule, factor)])
        run.guarded.check()
    return run.state


@pytest.mark.one_in(5)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", [*observe_cases(), *every_dtype()], ids=str)
def test_native_equals_the_reference(case, scale):
    actual, expected = observed(case, host, scale), observed(case, reference, scale)
    for name, tensor in expected.items():
        cases.assert_same(actual[name], tensor, name, case)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("implementation", [host, reference])
@pytest.mark.parametrize("case", every_dtype(), ids=str)
def test_the_state_is_that_after_a_step(case, implementation):
    run = cases._Run(case, implementation, cases.CPU)
    rule = Rule(lr=0.1, **(cases.RULES[case.rule] | {"weight_decay": 0.0, "sign": 1.0}))
    for step in range(cases.NUM_STEPS):
        implementation.step(run.param, cases.arrivals(case, step)[0], rule, None, run.second, None)
    for name, tensor in observed(case, implementation).items():
        if name != "param":
            cases.assert_same(tensor, run.state[name], name, case)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("implementation", [host, reference])
@pytest.mark.parametrize("case", every_dtype(), ids=str)
def test_the_scaled_gradient_is_what_is_fed(case, implementation):
    run = cases._Run(case, implementation, cases.CPU)
    rule = Rule(lr=0.1, **cases.RULES[case.rule])
    for step in range(cases.NUM_STEPS):
        grad = cases.arrivals(case, step)[0].float() * 0.37
        implementation.observe([Observation(Observed(run.second), grad, rule, None)])
    for name, tensor in observed(case, implementation, 0.37).items():
        assert torch.equal(tensor, run.state[name]), name


@pytest.mark.parametrize("second", SECONDS)
def test_the_number_of_threads_reaches_no_result(second, threads):
    case = Case("none", second, "dense", (300, 150))
    threads(1)
    alone = observed(case, host)
    for count in (2, 5):
        threads(count)
        for name, tensor in observed(case, host).items():
            assert torch.equal(tensor, alone[name]), name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_what_does_not_fit_is_named():
    grad, rule, full = torch.zeros(3, 5), Rule(lr=0.1), Full(torch.zeros(3, 5))
    for message, arguments in (
        ("second is None", (grad, rule, None)),
        ("grad is torch.int64", (grad.long(), rule, full)),
        ("grad has shape", (grad[0], rule, full)),
        ("grad has strides", (grad.t(), rule, Full(torch.zeros(5, 3)))),
        ("second moment has shape", (grad, rule, Full(torch.zeros(5, 3)))),
        ("row has shape", (grad, rule, Factored(torch.zeros(5), torch.zeros(3)))),
        ("SM3 variant", (grad, rule, Cover(torch.zeros(3), torch.zeros(5), "III"))),
    ):
        with pytest.raises(ValueError, match=message):
            ops.observe(*arguments)
    for scale in (torch.ones(2), torch.ones(()), torch.ones(1, dtype=torch.float64)):
        with pytest.raises(ValueError, match="scale"):
            ops.observe(grad, rule, full, scale=scale)
