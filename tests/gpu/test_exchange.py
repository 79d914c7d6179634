"""The method on a GPU against the same on the CPU."""

import os

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from tests.unit.dgc.method import OPTIMIZERS

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    if os.environ.get("REQUIRE_GPU"):
        pytest.fail("REQUIRE_GPU is set and torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)

SHAPES = {"bias": (64,), "small": (50, 100), "large": (700, 100)}


def train_on(device, optimizer, settings):
    """Give two workers random gradients, one of them not a number; return parameters and state."""

    def work(comm):
        named = {name: nn.Parameter(torch.zeros(shape, device=device))
                 for name, shape in SHAPES.items()}  # fmt: skip
        mine = DistributedOptimizer(
            OPTIMIZERS[optimizer](named.values()), named.items(), comm=comm, bucket_bytes=10**6,
            compression=Compression(density=0.01, **settings),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(comm.rank)
        for step in range(6):
            for name, parameter in named.items():
                grad = torch.randn(parameter.shape, generator=generator)
                if (step, name, comm.rank) == (3, "large", 1):
                    grad[5, 5] = float("nan")
                parameter.backward(grad.to(device))
            mine.step()
            assert bool(mine.stats.skipped) == (step == 3)
            mine.zero_grad()
        return {name: parameter.detach().cpu() for name, parameter in named.items()}

    return run_local(2, work)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("momentum", {"value_dtype": "float16", "velocity_dtype": "int8"}),
        ("factored", {"residual_dtype": "bfloat16", "clip_norm": 1.0, "clip_scope": "tensor"}),
        ("factored", {"residual_dtype": "int8", "share_statistics": 1.0}),
        ("cover", {"select_by": "preconditioned"}),
        ("sketch", {"preconditioning": "early", "momentum": 0.9}),
        ("full", {"preconditioning": "after"}),
        ("torch adam", {}),
    ],
)
def test_a_gpu_trains_as_a_cpu_does(optimizer, settings):
    on_gpu = train_on(torch.device("cuda", 0), optimizer, settings)
    on_cpu = train_on(torch.device("cpu"), optimizer, settings)
    for name in SHAPES:
        assert torch.equal(on_gpu[0][name], on_gpu[1][name])
        # a rounding apart, an entry may be stored, or chosen, otherwise: few are
        close = torch.isclose(on_gpu[0][name], on_cpu[0][name], rtol=1e-3, atol=1e-6)
        assert close.float().mean() > 0.995, name
