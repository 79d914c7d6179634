"""What the update takes for a first moment in a sketch: every implementation is a naive loop."""

import numpy as np
import pytest
import torch

from kernels import device, host, reference
from kernels.operands import Full, Rule, Table
from kernels.reference import hash_rows
from tests.unit.kernels import cases

N, M, WIDTH = 30, 4, 4
MODES = ("dense", "rows", "elements")
RULES = {
    "average": {"first_beta": 0.75, "first_gain": 0.25, "first_decay": 0.25, "first_scale": 2.0},
    "momentum": {"first_beta": 0.75, "first_gain": 1.0, "first_decay": 0.25},
    "no decay": {"first_beta": 1.0, "first_gain": 0.5, "first_decay": 0.0, "first_scale": 4.0},
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
    """Return what the update takes for each entry of a gradient (N, M), and where tables differ."""
    buckets, signs = hash_rows(first, torch.arange(N))
    flat = first.values.flatten(0, 1)
    taken, differ = np.zeros((N, M)), np.zeros((N, M), dtype=bool)
    for i in range(N):
        for c in range(M):
            g = float(grad[i, c])
            found = [float(flat[b, c] * s) for b, s in zip(buckets[:, i], signs[:, i], strict=True)]
            if any(q < 0 for q in found) and any(q > 0 for q in found):
                differ[i, c] = True
                taken[i, c] = g * rule.first_gain / (rule.first_decay or 1.0)
            else:
                nearest = min(found, key=abs)
                taken[i, c] = rule.first_scale * (rule.first_beta * nearest + rule.first_gain * g)
    return taken, differ


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


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_it_is_that_of_a_naive_loop(implementation, depth, mode, rule):
    """Small integers and powers of 2: without rounding, so that all must be equal."""
    rule, first = Rule(lr=1.0, **RULES[rule]), filled(depth)
    grad = torch.randint(-3, 4, (N, M), generator=torch.Generator().manual_seed(9)).float()
    expected, differ = loop(first, grad, rule)
    param = torch.zeros(N, M)
    arrived = take_step(implementation, mode, param, grad, rule, first)
    assert torch.equal(-param, torch.from_numpy(expected).float() * arrived)
    assert differ[arrived.numpy()].any() == (depth > 1)


@pytest.mark.parametrize("mode", MODES)
def test_upkeep_is_that_of_the_sketch_by_itself(implementation, mode):
    """The median, before the insertions, is what a bucket forgets."""
    rule, first = Rule(lr=1.0, **RULES["average"]), filled(3)
    alone = Table(first.values.clone(), first.seeds, True)
    grad = torch.randn(N, M, generator=torch.Generator().manual_seed(9))
    take_step(implementation, mode, torch.zeros(N, M), grad, rule, first)
    if mode == "elements":
        take_step(reference, mode, torch.zeros(N, M), grad, rule, alone)
    else:
        rows = torch.arange(N) if mode == "dense" else torch.arange(1, N, 2)
        reference.sketch_update(alone, rows, grad[rows], rule.first_gain, rule.first_decay)
    assert torch.equal(first.values, alone.values)


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
