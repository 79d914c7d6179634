"""Defaults of torch, of dtype and device: they reach no message, no state and no parameter."""

import copy
import math

import pytest
import torch

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from tests.unit.dgc.method import CHOICES, Job, assert_equal, run_jobs
from tests.unit.dgc.worker.test_elements import loss_of, parameters, sgd

DEFAULTS = {name: values[0] for name, values in CHOICES.items()}


@pytest.fixture
def float64_is_default():
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("momentum", {"protocol": "gather", "residual_dtype": "int8", "velocity_dtype": "int8"}),
        ("sgd", {"protocol": "sparse_all_reduce", "value_dtype": "mxfp4", "clip": "tensor"}),
        ("torch adam", {"density": 1.0, "clip": "global"}),
        ("factored", {"two_level": True, "share_statistics": math.inf, "value_dtype": "mxfp8"}),
        ("factored", {"preconditioning": "early", "index_coding": "elias_fano", "exact_below": 0}),
        ("full", {"select_by": "preconditioned", "residual_dtype": "bfloat16", "momentum": 0.9}),
        ("sketch", {"protocol": "sparse_all_reduce", "micro_batches": 3}),
    ],
)
def test_defaults_of_torch_change_nothing(name, settings, float64_is_default):
    choice = DEFAULTS | settings

    def steps(job):
        for n in range(3):
            job.step((0, math.inf) if n == 1 else None)
        state = job.state()
        job.optimizer.load_worker_state_dict(state["worker"])
        job.step()
        return state, job.state()

    plain = run_jobs(4, name, choice, steps)
    float64_is_default()

    def work(comm):
        with torch.device("meta"):
            return steps(Job(comm, name, choice))

    assert_equal(run_local(4, work, ranks_per_node=4), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_defaults_of_torch_change_nothing_of_rows_and_zeros(dtype, density, float64_is_default):
    def work(comm):
        named = parameters(dtype)
        optimizer = DistributedOptimizer(
            sgd(named.values()), named.items(), comm=comm, row_sparse=["table"],
            compression=Compression(density=density, min_numel=1), micro_batches_per_step=2,
        )  # fmt: skip
        generator = torch.Generator("cpu").manual_seed(comm.rank)
        for step in range(3):
            if step != comm.rank:  # the others' gradients alone
                named["matrix"].grad = torch.full_like(named["matrix"], 0.1)
                for _ in range(2):
                    loss_of(named, generator).abs().backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy((named, optimizer.worker_state_dict()))

    plain = run_local(2, work)
    float64_is_default()

    def on_meta(comm):
        with torch.device("meta"):
            return work(comm)

    assert_equal(run_local(2, on_meta), plain)
