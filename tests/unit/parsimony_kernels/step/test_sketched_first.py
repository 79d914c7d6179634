"""What the update takes for a first moment in a sketch: every implementation is a naive loop."""

import statistics

import numpy as np
import pytest
import torch

from parsimony_kernels.runtime.operands import Full, Rule, Table
from parsimony_kernels.step import device, host, reference
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.unit.parsimony_kernels import cases

N, M, WIDTH = 30, 4, 4
MODES = ("dense", "rows", "elements")
RULES = {
    "average": {
        **{"first_beta": 0.75, "first_gain": 0.25, "first_forgetting": 0.25, "first_scale": 2.0}
    },
    "momentum": {"first_beta": 0.75, "first_gain": 1.0, "first_forgetting": 0.25},
    "no decay": {"first_beta": 1.0, "first_gain": 0.5, "first_forgetting": 0.0, "first_scale": 4.0},
}
MODULES = {"reference": reference, "host": host, "device": device}


@pytest.fixture(params=MODULES)
def implementation(request, emulated):
    emulated()
    return MODULES[request.param]


def filled(depth):
    generator = torch.Generator().manual_seed(depth)
    values = torch.randint(-4, 5, (depth, WIDTH, M), generator=generator).float()
    return cases.table(values, signed=True, seed=depth)


def loop(first, grad, rule):
    """Return what the update takes for each entry of a gradient (N, M), and how far m is known."""
    buckets, signs = hash_rows(first, torch.arange(N))
    flat, depth = first.values.double().flatten(0, 1), len(buckets)
    taken, known = np.zeros((N, M)), np.zeros((N, M))
    for i in range(N):
        for c in range(M):
            g = float(grad[i, c])
            found = [float(flat[b, c] * s) for b, s in zip(buckets[:, i], signs[:, i], strict=True)]
            mean, error = statistics.fmean(found), 0.0
            if depth > 1:
                error = statistics.variance(found) / depth
            own = g * rule.first_gain / (rule.first_forgetting or 1.0)
            moment = rule.first_scale * (rule.first_beta * mean + rule.first_gain * g)
            w = max(0.0, 1 - rule.first_doubt * error / mean**2) if mean else float(not error)
            taken[i, c], known[i, c] = w * moment + (1 - w) * own, w
    return taken, known


def take_step(implementation, mode, param, grad, rule, first, second=None):
    """Step with a gradient (N, M): all of it, its odd rows, or every third element."""
    if mode == "dense":
        implementation.step(param, grad, rule, first, second, None)
        return torch.ones(N, M, dtype=torch.bool)
    arrived = torch.zeros(N, M, dtype=torch.bool)
    if mode == "rows":
        rows = torch.arange(1, N, 2)
        implementation.step(param, grad[rows].contiguous(), rule, first, second, rows)
        arrived[rows] = True
    else:
        at = torch.arange(0, N * M, 3)
        implementation.step_elements(param, grad.view(-1)[at], at, rule, first, second)
        arrived.view(-1)[at] = True
    return arrived


@pytest.mark.one_in(7)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_that_of_a_naive_loop(implementation, depth, mode, rule):
    rule, first = Rule(lr=1.0, **RULES[rule]), filled(depth)
    grad = torch.randint(-3, 4, (N, M), generator=torch.Generator().manual_seed(9)).float()
    expected, known = loop(first, grad, rule)
    param = torch.zeros(N, M)
    arrived = take_step(implementation, mode, param, grad, rule, first)
    expected = torch.from_numpy(expected).float() * arrived
    torch.testing.assert_close(-param, expected, rtol=1e-5, atol=1e-5)
    known = known[arrived.numpy()]
    assert (known == 0).any() == ((0 < known) & (known < 1)).any() == (depth > 1)


@pytest.mark.parametrize("mode", MODES)
def test_equal_estimates_are_taken_to_the_bit(implementation, mode):
    """Thirds are not exact: a mean of three equal numbers could be another number."""
    rule, first = Rule(lr=1.0, **RULES["average"]), filled(3)
    value = torch.randn(1, generator=torch.Generator().manual_seed(1))
    buckets, signs = hash_rows(first, torch.arange(N))
    first.values.flatten(0, 1)[buckets[:, 1]] = value * signs[:, 1, None]
    param = torch.zeros(N, M)
    arrived = take_step(implementation, mode, param, torch.zeros(N, M), rule, first)[1]
    assert arrived.any()
    assert (param[1][arrived] == -2.0 * (0.75 * value)).all()


@pytest.mark.parametrize("mode", MODES)
def test_upkeep_is_that_of_the_sketch_by_itself(implementation, mode):
    """A bucket forgets the medians from before the insertions; all alike where all rows arrive."""
    rule, first = Rule(lr=1.0, **RULES["average"]), filled(3)
    alone = Table(first.values.clone(), first.seeds, True)
    grad = torch.randn(N, M, generator=torch.Generator().manual_seed(9))
    take_step(implementation, mode, torch.zeros(N, M), grad, rule, first)
    if mode == "elements":
        take_step(reference, mode, torch.zeros(N, M), grad, rule, alone)
    elif mode == "rows":
        rows = torch.arange(1, N, 2)
        reference.sketch_update(alone, rows, grad[rows], rule.first_gain, rule.first_forgetting)
    else:
        added = Table(torch.zeros_like(alone.values), alone.seeds, True)
        reference.sketch_insert(added, torch.arange(N), grad * rule.first_gain)
        alone.values.mul_(rule.first_beta).add_(added.values)
    assert torch.equal(first.values, alone.values)


@pytest.mark.parametrize("rule", ["average", "momentum"])
def test_of_whole_gradients_the_sketch_is_that_of_the_moment(implementation, rule):
    rule, first, m = Rule(lr=1.0, **RULES[rule]), filled(3), torch.zeros(N, M)
    first.values.zero_()
    for seed in range(20):
        grad = torch.randn(N, M, generator=torch.Generator().manual_seed(seed))
        m = rule.first_beta * m + rule.first_gain * grad
        take_step(implementation, "dense", torch.zeros(N, M), grad, rule, first)
    exact = Table(torch.zeros_like(first.values), first.seeds, True)
    reference.sketch_insert(exact, torch.arange(N), m)
    torch.testing.assert_close(first.values, exact.values)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_is_not_hidden(implementation, depth, mode):
    """Estimates that are NaN or infinite, and gradients, with the same result everywhere."""
    rule = Rule(lr=1.0, eps_outside=1e-8, **RULES["average"])
    grad = torch.randn(N, M, generator=torch.Generator().manual_seed(9))
    grad[3, 1], grad[5, 1], grad[7, 2] = float("nan"), float("inf"), -float("inf")
    results = []
    for module in (reference, implementation):
        param, first = torch.zeros(N, M), filled(depth)
        for j in range(depth):
            first.values[j, j % WIDTH, 0] = float("nan")
            first.values[j, -1, 3] = float("inf")
        buckets, _ = hash_rows(first, torch.arange(N))
        spoilt = first.values.flatten(0, 1)[buckets].isnan().any(0) | grad.isnan()
        arrived = take_step(module, mode, param, grad, rule, first, Full(torch.ones(N, M)))
        results.append(param)
        assert param[spoilt & arrived].isnan().all()
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
