"""What the optimizer finds in `p.grad`."""

import copy

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from tests.unit.dgc.method import assert_equal

SHAPE = (8, 6, 5, 4)
VALUES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "channels_last, an axis of 1": lambda x: x[:, :1].contiguous(memory_format=torch.channels_last),
    "strange strides of axes of 1": lambda x: x[:, :1, :1].contiguous().as_strided(
        (8, 1, 1, 4), (4, 99, 7, 1)
    ),
}  # fmt: skip
OPTIMIZERS = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
}


def train(comm, make, layout, compression, wraps=True):
    weight = nn.Parameter(LAYOUTS[layout](VALUES))
    optimizer = make([weight])
    if wraps:
        optimizer = DistributedOptimizer(optimizer, [("w", weight)], comm=comm,
                                         compression=compression)  # fmt: skip
    generator, strides = torch.Generator().manual_seed(comm.rank), set()
    for _ in range(3):
        optimizer.zero_grad()
        weights = torch.randn(SHAPE, generator=generator)[:, : weight.shape[1], : weight.shape[2]]
        (weight.square() * weights).sum().backward()
        optimizer.step()
        strides.add(None if weight.grad is None else weight.grad.stride())
    return weight.detach().clone(), weight.stride(), strides


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_come_back_in_the_parameters_strides(name, layout):
    (alone, *_), (ours, parameters, gradients) = (
        run_local(1, lambda comm, w=w: train(comm, OPTIMIZERS[name], layout, None, w))[0]
        for w in (False, True)
    )
    if layout != "with gaps":  # with these torch's own fused optimizers go wrong
        assert gradients == {parameters}
    elif "fused" in name:
        return
    assert torch.equal(ours, alone)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("two_level", [False, True])
def test_strides_make_no_difference_to_what_is_sent(name, two_level):
    compression = Compression(density=0.1, min_numel=1, two_level=two_level, momentum=None,
                              momentum_correction=False)  # fmt: skip
    plain, *others = (
        run_local(4, lambda comm, x=x: train(comm, OPTIMIZERS[name], x, compression)[0],
                  ranks_per_node=2)
        for x in ("contiguous", "channels_last", "permuted")
    )  # fmt: skip
    for other in others:
        assert_equal(other, plain)


def test_a_contiguous_mean_is_not_copied():
    def work(comm):
        weight = nn.Parameter(torch.ones(40, 30))
        optimizer = DistributedOptimizer(
            torch.optim.Adam([weight]), [("w", weight)], comm=comm, bucket_bytes=1
        )
        flats = []
        reduce = comm.all_reduce_async
        comm.all_reduce_async = lambda t, name: flats.append(t) or reduce(t, name)
        weight.sum().backward()
        optimizer.step()
        return weight.grad.data_ptr() == flats[0].data_ptr()

    assert run_local(2, work) == [True, True]


@pytest.mark.parametrize("compression", [None, Compression(density=0.5, min_numel=1)])
def test_gradients_of_any_strides_are_taken(compression):
    """A gradient by hand may repeat elements or have gaps, and so may a negated or sparse one's."""
    grads = {
        "expanded": torch.ones(1, 1).expand(6, 4),
        "with gaps": torch.arange(48.0).view(6, 8)[:, ::2],
        "column": torch.arange(48.0).view(6, 8)[:, 3:4],
        "negated": torch._neg_view(torch.arange(24.0).view(6, 4)),  # as conj().imag is
        "transposed": torch.arange(24.0).view(4, 6).t(),
    }

    def work(comm, grad):
        weight = nn.Parameter(torch.zeros(grad.shape))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), [("w", weight)],
                                         comm=comm, compression=compression)  # fmt: skip
        weight.grad = grad
        for _ in range(1 if compression is None else 2):
            optimizer.step()
            weight.grad = None
        return copy.deepcopy(weight.detach())

    for grad in grads.values():
        for weight in run_local(2, lambda comm, g=grad: work(comm, g)):
            torch.testing.assert_close(weight, -grad)
