"""How much a step launches on a GPU: by bucket, not by tensor."""

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import SM3, Adam, FactoredAdam
from tests.emulation.pretended import Pretended, Watch, pretend
from tests.unit.dgc.exchange.test_waits import RECOMMENDED, adam

NUM_TENSORS, MOST = 60, 110  # with one launch more a tensor it would be 130 at least


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    pretend(monkeypatch)


def launches(make, num_tensors, **settings):
    """Return what the exchange of a step launches: of several steps, the one with the least, as it
    is chance whether tensors must be looked through again in a step."""
    counted = []

    def work(comm):
        generator = torch.Generator().manual_seed(0)
        with Watch() as watch:
            named = {f"p{n}": nn.Parameter(Pretended(torch.zeros(40, 30 + n % 3)))
                     for n in range(num_tensors)}  # fmt: skip
            optimizer = DistributedOptimizer(
                make(named.values()), named.items(), comm=comm, bucket_bytes=10**9,
                compression=Compression(**settings),
            )  # fmt: skip
            for _ in range(9):
                for p in named.values():
                    p.backward(Pretended(torch.randn(p.shape, generator=generator)))
                watch.launches.clear()
                optimizer.synchronize()
                counted.append(watch.launches.copy())
                optimizer.step()
                optimizer.zero_grad()

    run_local(1, work)
    return min(counted[4:], key=lambda each: each.total())


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (adam(FactoredAdam), RECOMMENDED),
        (lambda p: SM3(p, lr=0.1, momentum=0.0), RECOMMENDED),
        (adam(Adam), RECOMMENDED),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"density": 0.01}),
    ],
)
def test_a_bucket_launches_as_much_however_many_tensors_it_has(make, settings):
    settings = {**settings, "density": 0.03, "exact_below": 1000, "clip_norm": None}
    found = launches(make, NUM_TENSORS, **settings)
    assert found.total() <= MOST, found.most_common(20)
