"""The exchange on a GPU against the same on the CPU."""

import os

import pytest
import torch

from dgc import Compression
from dgc.compensate import Compensation
from dgc.exchange import Exchange, TensorSpec
from dgc.local import run_local

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    if os.environ.get("REQUIRE_GPU"):
        pytest.fail("REQUIRE_GPU is set and torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)


def exchange_on(device, value_dtype):
    def work(comm):
        specs = [TensorSpec(f"w{n}", n, device, n > 100) for n in (64, 5000, 70_000)]
        compression = Compression(density=0.01, sample_ratio=1.0, value_dtype=value_dtype)
        exchange = Exchange(comm, compression, Compensation(0.9), seed=0)
        exchange.plan(specs, 0.01, 10**6)
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(5):
            for spec in specs:
                exchange.add(spec.name, torch.randn(spec.numel, generator=generator).to(device))
            means = {name: mean.cpu() for name, mean in exchange.finish()}
        return means

    return run_local(2, work)


@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_a_gpu_exchanges_what_a_cpu_does(value_dtype):
    on_gpu = exchange_on(torch.device("cuda", 0), value_dtype)
    on_cpu = exchange_on(torch.device("cpu"), value_dtype)
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        for name in cpu:
            torch.testing.assert_close(gpu[name], cpu[name])
