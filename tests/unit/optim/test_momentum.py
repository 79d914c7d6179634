import pytest
import torch

from optim import Momentum, SketchMomentum
from tests.tolerances import assert_close
from tests.unit.optim.helpers import (
    assert_no_collisions,
    gradients,
    parameter,
    row_sparse,
    step,
    unknown_entries,
)


@pytest.mark.parametrize("make", [Momentum, SketchMomentum])
@pytest.mark.parametrize("shape", [(12, 5), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_without_collisions_it_is_torch_s_sgd(make, shape, depth):
    p, q = parameter(*shape), parameter(*shape)
    optimizer = make([p], 0.01, 0.9, width=5000, depth=depth, min_compressed_numel=0)
    if make is SketchMomentum:
        assert_no_collisions(optimizer, p)
    other = torch.optim.SGD([q], 0.01, 0.9)
    for grad in gradients(8, *shape):
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


def test_without_momentum_it_is_plain_descent_and_keeps_nothing():
    p, q = parameter(12, 5), parameter(12, 5)
    optimizer, other = SketchMomentum([p], 0.1, 0.0), torch.optim.SGD([q], 0.1)
    for grad in gradients(3, 12, 5):
        step(optimizer, p, grad)
        step(other, q, grad.clone())
    assert_close(p.detach(), q.detach())
    assert set(optimizer.state[p]) == {"step"}


def test_it_has_no_second_moment_to_estimate():
    p = parameter(2, 3)
    with pytest.raises(ValueError, match="one without a second moment"):
        Momentum([p]).estimate(p)


@pytest.mark.parametrize("size_ratio", [0.2, 0.05, 0.01])
def test_a_small_sketch_does_not_blow_up(size_ratio):
    """60 or 300 rows share a bucket; with the paper's decay for each, this was NaN in 200 steps."""
    parameter = torch.nn.Parameter(torch.zeros(1000, 24))
    optimizer = SketchMomentum([parameter], lr=1e-3, size_ratio=size_ratio)
    generator, largest = torch.Generator().manual_seed(0), []
    for _ in range(200):
        parameter.grad = torch.randn(1000, 24, generator=generator)
        optimizer.step()
        largest.append(float(optimizer.state[parameter]["momentum_buffer"].abs().max()))
    assert max(largest[100:]) < 3 * max(largest[:100])


def test_where_estimates_disagree_a_rare_row_among_frequent_ones_moves_by_its_own_gradient():
    p = parameter(40, 8)
    optimizer = SketchMomentum([p], 0.1, 0.75, size_ratio=0.5, min_compressed_numel=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(20, generator=generator)[:10]
        step(optimizer, p, row_sparse(rows, torch.randn(10, 8, generator=generator), (40, 8)))
    before, rare = p.detach().clone(), torch.arange(20, 40)
    unknown = unknown_entries(optimizer, p, "momentum_buffer", doubt=1)[rare]
    grad = torch.randn(20, 8, generator=generator)
    step(optimizer, p, row_sparse(rare, grad, (40, 8)))
    assert unknown.sum() > 50
    assert_close(p.detach()[rare][unknown], (before[rare] - 0.1 * grad / (1 - 0.75))[unknown])
