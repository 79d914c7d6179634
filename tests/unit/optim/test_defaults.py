"""torch.set_default_dtype and torch.set_default_device change nothing in state or steps."""

import copy

import pytest
import torch

import optim
from parsimony_kernels.step import ops
from tests.defaults import DEFAULTS, assert_same, torch_defaults
from tests.unit.optim.helpers import EVERY_OPTIMIZER, gradients, parameter

SHAPES = [(12, 5), (6, 2, 9), (4,)]
INDICES = torch.tensor([0, 7, 31])


def arrivals():
    """Return what arrives in each step: .grads, dense, of rows or of elements, and `elements`."""
    dense = list(zip(*(gradients(5, *shape) for shape in SHAPES), strict=True))
    rows = (dense[1][0] * (torch.arange(12)[:, None] % 2)).to_sparse(1)
    coo = (dense[2][1] * (dense[2][1] > 0)).to_sparse()
    values = torch.tensor([1.0, -2.0, 0.5])
    return [
        (dense[0], None), ((rows, *dense[1][1:]), None), ((dense[2][0], coo, dense[2][2]), None),
        ((dense[3][0], None, dense[3][2]), (INDICES, values)), (dense[4], None),
    ]  # fmt: skip


def run(make, parameters, other_parameters, steps):
    """Make, step, save, load and step again; return all that this leaves."""
    optimizer = make(parameters)
    for number, (grads, elements) in enumerate(steps):
        if number == 3:
            saved, parameters = optimizer.state_dict(), other_parameters
            optimizer = make(parameters)
            optimizer.load_state_dict(saved)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        optimizer.step(elements=elements and {parameters[1]: elements})
    estimates = [optimizer.estimate(p) for p in parameters if optimizer.has_second_moment]
    return [parameters, list(optimizer.state.values()), optimizer.state_bytes(), estimates]


def precondition(make, p, grads):
    apart = make([p]).delegate_second_moment(p)
    if apart is None:
        return []
    for grad in grads:
        apart.observe(grad.view(-1), scale=None, num_parts=1, is_first=True)
    return [apart.tensors, apart.root(), apart.root(INDICES)]


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
def test_an_optimizer_is_the_same_under_every_default(name, implementation):
    make = EVERY_OPTIMIZER[name]
    start, steps = [parameter(*shape) for shape in SHAPES], arrivals()
    grads = [grad[1] for grad, _ in steps if grad[1] is not None and not grad[1].is_sparse]

    def everything(a, b, c):
        return [*run(make, a, b, steps), *precondition(make, c[1], grads)]

    copies = [[copy.deepcopy(start) for _ in range(3)] for _ in range(1 + len(DEFAULTS))]
    with ops.use(implementation):
        expected = everything(*copies.pop())
        for default in DEFAULTS:
            with torch_defaults(default):
                found = everything(*copies.pop())
            assert_same(found, expected)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("kind", [optim.CountSketch, optim.CountMinSketch])
def test_a_sketch_is_the_same_under_every_default(default, kind):
    rows, values = torch.tensor([3, 1, 3]), torch.ones(3, 2)

    def run():
        sketch = kind(10, 2, seed=5)
        sketch.insert(rows, values)
        estimates = sketch.update(rows[:2], values[:2], gain=0.5, decay=0.1)
        sketch.clean(0.5)
        return [sketch.state_dict(), estimates, sketch.query(rows)]

    expected = run()
    with torch_defaults(default):
        found = run()
    assert_same(found, expected)
