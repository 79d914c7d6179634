"""Up to which rate SketchMomentum is stable, as its docstring has it."""

import math

import pytest
import torch

from optim import SketchMomentum
from tests.unit.optim.helpers import row_sparse, step

N, M = 192, 6


def largest_stable(momentum, size_ratio):
    """Of lr x curvature, of dense gradients."""
    of_shared_buckets = (1 - momentum) / momentum * size_ratio / (1 + 2 * math.sqrt(size_ratio))
    return min(2 * (1 - momentum), of_shared_buckets)


def hessian(kind, generator):
    """Of the rows; its largest curvature is 1."""
    if kind == "equal":
        return torch.eye(N)
    curvatures = 10 ** -torch.rand(N, generator=generator)
    curvatures[0] = 1
    basis = torch.linalg.qr(torch.randn(N, N, generator=generator))[0]
    return basis @ torch.diag(curvatures) @ basis.T


def descend(kind, lr, momentum, num_steps, *, num_rows=N, seed=0, **sizes):
    """Return how many times smaller the parameter is after steps down a quadratic."""
    generator = torch.Generator().manual_seed(seed)
    curvature = hessian(kind, generator)
    p = torch.nn.Parameter(torch.randn(N, M, generator=generator))
    optimizer = SketchMomentum([p], lr, momentum, min_compressed_numel=0, seed=seed, **sizes)
    start = p.detach().norm()
    for _ in range(num_steps):
        grad = curvature @ p.detach()
        if num_rows < N:
            rows = torch.randperm(N, generator=generator)[:num_rows].sort().values
            grad = row_sparse(rows, grad[rows], (N, M))
        step(optimizer, p, grad)
    return float(start / p.detach().norm())


@pytest.mark.parametrize("kind", ["equal", "rotated"])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize(
    ("size_ratio", "depth"), [(0.05, 3), (0.2, 2), (0.2, 3), (0.2, 5), (1.0, 3), (3.0, 3)]
)
def test_it_descends_at_the_rate_that_is_said_to_be_stable(kind, momentum, size_ratio, depth):
    lr = largest_stable(momentum, size_ratio)
    num_steps = int(60 * (1 - momentum) / lr)  # of gradient descent: 60 where the curvature is 1
    sizes = {"size_ratio": size_ratio, "depth": depth}
    assert descend(kind, lr, momentum, num_steps, **sizes) > 50


@pytest.mark.parametrize("size_ratio", [0.05, 0.2])
def test_not_far_above_that_it_diverges(size_ratio):
    """So that the docstring is mended when this is."""
    lr = 5 * largest_stable(0.9, size_ratio)
    assert descend("equal", lr, 0.9, 1500, size_ratio=size_ratio) < 1e-3


@pytest.mark.parametrize("size_ratio", [0.05, 0.2, 1.0])
def test_rows_descend_up_to_gradient_descent_s_rate(size_ratio):
    lr = 0.9 * 2 * (1 - 0.9)
    assert descend("equal", lr, 0.9, 600, num_rows=N // 8, size_ratio=size_ratio) > 1000
