import pytest
import torch

from optim import RMSprop, SketchRMSprop
from tests.tolerances import assert_close
from tests.unit.optim.helpers import assert_no_collisions, gradients, parameter, step


@pytest.mark.parametrize("make", [RMSprop, SketchRMSprop])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(12, 5), (6, 2, 3)], ids=str)
def test_without_collisions_it_is_torch_s(make, momentum, shape):
    p, q = parameter(*shape), parameter(*shape)
    optimizer = make([p], 0.01, 0.9, momentum=momentum, width=5000, min_compressed_numel=0)
    if make is SketchRMSprop:
        assert_no_collisions(optimizer, p)
    other = torch.optim.RMSprop([q], 0.01, 0.9, momentum=momentum)
    for grad in gradients(8, *shape):
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("second_moment", ["cover", "factored"])
def test_any_structure_estimates_a_matrix_of_rank_one(second_moment):
    """Squares that are an outer product are what a factored mean can hold; a cover is above."""
    p, optimizer = parameter(6, 5), None
    optimizer = RMSprop([p], 0.01, 0.9, second_moment=second_moment, min_compressed_numel=0)
    square = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 6))
    for _ in range(5):
        step(optimizer, p, square.sqrt())
    exact = square * (1 - 0.9**5)
    if second_moment == "factored":
        assert_close(optimizer.estimate(p), exact)
    else:
        assert (optimizer.estimate(p) >= exact * (1 - 1e-6)).all()
