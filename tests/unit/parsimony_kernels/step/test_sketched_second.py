"""What the update takes for a second moment in a sketch: every implementation is a naive loop."""

import math

import numpy as np
import pytest
import torch

from parsimony_kernels.runtime.operands import Rule, Table
from parsimony_kernels.step import reference
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.step.test_sketched_first import (
    MODES,
    WIDTH,
    M,
    N,
    implementation,
    take_step,
)

__all__ = ["implementation"]  # a fixture
RULES = {
    "average": {"second_beta": 0.75, "second_gain": 0.25, "second_forgetting": 0.25},
    "sum": {"second_beta": 1.0, "second_gain": 0.5, "second_forgetting": 0.0},
    "crowded": {"second_beta": 0.01, "second_gain": 0.99, "second_forgetting": 0.99},
    "scarcely": {"second_beta": 0.999, "second_gain": 0.001, "second_forgetting": 0.001},
}


def filled(depth):
    generator = torch.Generator().manual_seed(depth)
    values = torch.randint(0, 5, (depth, WIDTH, M), generator=generator).float()
    return cases.table(values, signed=False, seed=depth)


def gradient():
    return torch.randint(-3, 4, (N, M), generator=torch.Generator().manual_seed(9)).float()


def loop(second, grad, rule):
    """Return the update of each entry, of a gradient (N, M), with the second moment's root."""
    buckets, _ = hash_rows(second, torch.arange(N))
    flat, updates = second.values.double().flatten(0, 1), np.zeros((N, M))
    for i in range(N):
        for c in range(M):
            g, estimate = float(grad[i, c]), min(float(flat[b, c]) for b in buckets[:, i])
            nu = rule.second_beta * estimate + rule.second_gain * g * g
            updates[i, c] = g / math.sqrt(nu) if nu else 0.0
    return torch.from_numpy(updates).float()


@pytest.mark.one_in(7)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_it_follows_from_the_estimate_before_the_step(implementation, depth, mode, rule):
    """The other rows' gradients, which a query after the step would find, are not in it."""
    rule, second, grad = Rule(lr=1.0, **RULES[rule]), filled(depth), gradient()
    expected, param = loop(second, grad, rule), torch.zeros(N, M)
    arrived = take_step(implementation, mode, param, grad, rule, None, second)
    torch.testing.assert_close(-param, expected * arrived, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_upkeep_is_that_of_the_sketch_by_itself(implementation, mode, rule):
    rule, second, grad = Rule(lr=1.0, **RULES[rule]), filled(3), gradient()
    alone = Table(second.values.clone(), second.seeds, False)
    take_step(implementation, mode, torch.zeros(N, M), grad, rule, None, second)
    square, forgetting = grad * rule.second_gain * grad, rule.second_forgetting
    if mode == "dense":
        reference.sketch_update(alone, torch.arange(N), square, 1.0, forgetting)
    elif mode == "rows":
        rows = torch.arange(1, N, 2)
        reference.sketch_update(alone, rows, square[rows], 1.0, forgetting)
    else:
        at = torch.arange(0, N * M, 3)
        cells = reference.Cells(alone, at // M, at % M)
        cells.update(square.view(-1)[at], 1.0, forgetting)
    assert torch.equal(second.values, alone.values)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", MODES)
def test_a_bucket_that_is_nan_is_not_hidden_by_the_others(implementation, depth, mode):
    rule, grad = Rule(lr=1.0, **RULES["average"]), gradient()
    for spoilt_table in range(depth):
        results = []
        for module in (reference, implementation):
            param, second = torch.zeros(N, M), filled(depth)
            second.values[spoilt_table, 1] = float("nan")
            second.values[spoilt_table, 2, 3] = float("inf")
            buckets, _ = hash_rows(second, torch.arange(N))
            spoilt = second.values.flatten(0, 1)[buckets].isnan().any(0)
            arrived = take_step(module, mode, param, grad, rule, None, second)
            assert param[spoilt & arrived].isnan().all() and (spoilt & arrived).any()
            results += [param, second.values]
        for expected, found in zip(results[:2], results[2:], strict=True):
            assert cases.same_numbers(found, expected)
