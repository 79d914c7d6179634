"""How often the host waits for a GPU in a step: at most once a bucket, and all buckets at the end.

On tensors that pretend to be on a GPU; what they come to is what the CPU computes.
"""

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.worker.residual import Compensation
from optim import SM3, Adam, FactoredAdam, SketchAdam
from tests.emulation.pretended import Pretended, Watch, pretend

RECOMMENDED = {  # as configs/optim/parsimony.py, but for the density: these tensors are small
    "density": 0.01, "residual_dtype": "bfloat16", "value_dtype": "mxfp8",
    "index_coding": "elias_fano", "update_scale": 4.0, "share_statistics": 0.5,
    "clip_scope": "tensor", "clip_norm": 1.0,
}  # fmt: skip
SHAPES = [(64, 40), (40,), (100, 96), (100,), (8, 4)]  # the third has a threshold, the first none


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    pretend(monkeypatch)


def adam(kind, **more):
    return lambda p: kind(p, betas=(0.0, 0.999), decoupled_weight_decay=True, **more)


def train(comm, watch, make, num_tensors, num_steps, look=lambda *_: None, **settings):
    """Train tensors of many shapes on random gradients; return them, as they are on the CPU."""
    generator = torch.Generator().manual_seed(comm.rank)
    place = Pretended if watch else torch.Tensor.clone
    with watch or torch.enable_grad():
        named = {
            f"p{n}": nn.Parameter(place(torch.zeros(SHAPES[n % len(SHAPES)])))
            for n in range(num_tensors)
        }
        optimizer = DistributedOptimizer(
            make(named.values()), named.items(), comm=comm, bucket_bytes=200_000,
            compression=Compression(**settings),
        )  # fmt: skip
        for step in range(num_steps):
            for p in named.values():
                p.backward(place(torch.randn(p.shape, generator=generator)))
            optimizer.step()
            optimizer.zero_grad()
            look(step, optimizer)
    return [(p.held if watch else p).detach() for p in named.values()]


def test_the_recommended_method_waits_no_more_often_than_it_has_buckets(monkeypatch):
    """But for residuals that are looked through again, all of a bucket together."""
    passes, select_again = [], Compensation.select_again
    monkeypatch.setattr(
        Compensation, "select_again", lambda *args: passes.append(1) or select_again(*args)
    )

    def work(comm):
        watch = Watch()

        def look(step, optimizer):
            num_buckets = len(optimizer._exchange.buckets)
            assert num_buckets >= 3
            assert watch.num_waits <= num_buckets + len(passes) or step < 3, watch.waits
            assert step != 4 or not passes
            watch.waits.clear()
            passes.clear()

        train(comm, watch, adam(FactoredAdam), 50, 5, look, **RECOMMENDED)

    run_local(1, work)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (adam(Adam), RECOMMENDED),
        (adam(Adam), {"density": 0.05, "momentum": 0.9, "velocity_dtype": "int8"}),
        (adam(Adam), {**RECOMMENDED, "density": 0.3, "clip_norm": None}),
        (adam(SketchAdam), {**RECOMMENDED, "protocol": "sparse_all_reduce"}),
        (lambda p: SM3(p, eps=0.0), {**RECOMMENDED, "two_level": True, "ranks_per_island": 2}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"density": 0.02}),
    ],
)
def test_what_a_gpu_computes_without_waiting_is_what_a_cpu_computes(make, settings):
    def work(comm, is_there):
        return train(comm, Watch() if is_there else None, make, 5, 6, **settings)

    there, here = (run_local(4, lambda c, t=t: work(c, t), ranks_per_node=2) for t in (True, False))
    for mine, theirs in zip(there, here, strict=True):
        assert all(map(torch.equal, mine, theirs))
