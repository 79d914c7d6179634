import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.optimizer.hooks.ownership import is_sole_owner


def test_a_tensor_is_ours_alone_only_if_nobody_else_can_reach_its_memory():
    mine = torch.ones(4, 5)
    assert is_sole_owner(mine)
    other = mine
    assert not is_sole_owner(mine)
    del other
    view = mine[1:]
    assert not is_sole_owner(mine)
    del view
    detached = mine.detach()
    assert not is_sole_owner(mine)
    del detached
    assert is_sole_owner(mine)
    assert not is_sole_owner(torch.ones(4, 5).t())
    assert not is_sole_owner(torch.ones(1).expand(7))
    assert not is_sole_owner(torch.ones(8)[:4])


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16"])
def test_the_residual_takes_the_gradients_place_unless_someone_kept_it(residual_dtype):
    def work(comm, keep):
        weight, kept, places = nn.Parameter(torch.zeros(90, 100)), [], []

        def look(parameter):
            places.append(parameter.grad.data_ptr())
            if keep:
                kept.append(parameter.grad)

        weight.register_post_accumulate_grad_hook(look)
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1), [("w", weight)], comm=comm,
            compression=Compression(density=0.01, residual_dtype=residual_dtype),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            (weight * torch.randn(90, 100, generator=generator)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        residual = optimizer.compensation.residual["w"]
        return residual, residual.data_ptr() == places[-1], [grad.clone() for grad in kept]

    ((alone, took_place, _),) = run_local(1, lambda comm: work(comm, False))
    ((watched, took_kept, kept),) = run_local(1, lambda comm: work(comm, True))
    assert took_place == (residual_dtype == "float32") and not took_kept
    assert torch.equal(alone, watched)
    generator = torch.Generator().manual_seed(0)
    assert all(torch.equal(grad, torch.randn(90, 100, generator=generator)) for grad in kept)
