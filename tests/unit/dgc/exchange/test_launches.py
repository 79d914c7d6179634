"""How much a step launches on a GPU: by bucket, not by tensor."""

import pytest

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import SM3, Adam, FactoredAdam
from tests.emulation.pretended import Pretended, Watch, pretend
from tests.unit.dgc.exchange.test_waits import RECOMMENDED, adam
import torch
from torch import nn


MOST = 120


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch):
    pretend(monkeypatch)


def launches(make, num_tensors, **settings):
    """Return what the exchange of a step launches that takes no tensor by itself."""
    counted = []

    def work(comm):
        generator = torch.Generator().manual_seed(0)
        with Watch() as watch:
            named = {f"p{n}": nn.Parameter(Pretended(torch.zeros(100, 96 + n % 3)))
                     for n in range(num_tensors)}  # fmt: skip
            optimizer = DistributedOptimizer(
                make(named.values()), named.items(), comm=comm, bucket_bytes=10**9,
                compression=Compression(**settings),
            )  # fmt: skip
            for _ in range(6):
                for p in named.values():
                    p.backward(Pretended(torch.randn(p.shape, generator=generator)))
                watch.launches.clear()
                optimizer.synchronize()
                counted.append(watch.launches.copy())
                optimizer.step()
                optimizer.zero_grad()

    run_local(1, work)
    return counted[-1]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (adam(FactoredAdam), RECOMMENDED),
        (lambda p: SM3(p, lr=0.1, momentum=0.0), RECOMMENDED),
        (adam(Adam), RECOMMENDED),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"density": 0.01}),
    ],
)
def test_a_bucket_of_many_tensors_launches_no_more_than_one_of_few(make, settings):
    settings = {name: value for name, value in settings.items() if name != "clip_norm"}
    few, many = (launches(make, number, **settings) for number in (4, 24))
    more = many - few
    assert more.total() == 0, more.most_common(10)
    assert many.total() <= MOST, many.most_common(20)
