import pytest
import torch

from optim import SM3, Adagrad, SketchAdagrad
from tests.tolerances import assert_close
from tests.unit.optim.helpers import assert_no_collisions, gradients, parameter, row_sparse, step

COLLISION_FREE = {"width": 5000, "min_compressed_numel": 0}


def follow(optimizer, p, other, q, grads):
    for grad in grads:
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("make", [Adagrad, SketchAdagrad])
@pytest.mark.parametrize("shape", [(12, 5), (6, 2, 3)], ids=str)
def test_without_collisions_it_is_torch_s(make, shape):
    p, q = parameter(*shape), parameter(*shape)
    optimizer = make([p], 0.1, **COLLISION_FREE)
    if make is SketchAdagrad:
        assert_no_collisions(optimizer, p)
    follow(optimizer, p, torch.optim.Adagrad([q], 0.1), q, gradients(8, *shape))


def test_without_collisions_row_sparse_steps_are_torch_s():
    p, q = parameter(12, 5), parameter(12, 5)
    optimizer = SketchAdagrad([p], 0.1, **COLLISION_FREE)
    assert_no_collisions(optimizer, p)
    generator = torch.Generator().manual_seed(0)
    grads = [
        row_sparse(torch.randint(0, 12, (6,), generator=generator), values, (12, 5))
        for values in gradients(8, 6, 5)
    ]
    follow(optimizer, p, torch.optim.Adagrad([q], 0.1), q, grads)


def test_a_sketch_never_underestimates_the_sum():
    p = parameter(60, 3)
    optimizer, total = SketchAdagrad([p], min_compressed_numel=0), torch.zeros(60, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        grad = torch.randint(-3, 4, (60, 3), generator=generator).float()
        step(optimizer, p, grad)
        total += grad**2
        assert (optimizer.estimate(p) >= total).all()


def test_a_cover_is_sm3():
    p, q = parameter(6, 5), parameter(6, 5)
    ours = Adagrad([p], 0.1, eps=0.0, second_moment="cover", min_compressed_numel=0)
    follow(ours, p, SM3([q], 0.1, eps=0.0), q, gradients(8, 6, 5))


def test_cleaning_multiplies_the_sketch_every_so_many_steps():
    p = parameter(12, 5)
    optimizer = SketchAdagrad([p], clean_factor=0.25, clean_interval=3, **COLLISION_FREE)
    assert_no_collisions(optimizer, p)
    expected = torch.zeros(12, 5)
    for turn, grad in enumerate(gradients(7, 12, 5), 1):
        step(optimizer, p, grad)
        expected = (expected + grad**2) * (0.25 if turn % 3 == 0 else 1)
        assert_close(optimizer.estimate(p), expected)
