"""Run by test_ranks.py on real ranks: the collectives and the exchange over them."""

import copy
import math
import sys

import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm import TorchComm
from dgc.comm.job import job
from dgc.comm.local import run_local
from optim import FactoredAdam, SketchAdam

NUM_STEPS, BATCH = 8, 16


def check_collectives(comm):
    values = torch.full((5,), float(comm.rank + 1))
    assert comm.all_reduce_async(values, "sum").wait() is values
    assert values.tolist() == [comm.world_size * (comm.world_size + 1) / 2] * 5
    mine = torch.full((8 * (comm.rank + 1),), comm.rank, dtype=torch.uint8)
    joined = comm.all_gather_async(mine, "join").wait()
    counts = torch.bincount(joined.long()).tolist()
    assert counts == [8 * (rank + 1) for rank in range(comm.world_size)]
    assert joined.diff().min() >= 0, "not in rank order"
    for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.bool):
        for shape in ((), (3, 5), (0,)):
            given = torch.full(shape, comm.rank == 0, dtype=dtype)
            comm.broadcast(given, f"{dtype}{shape}")
            assert (given == 1).all(), f"{dtype} {shape} is not rank 0's"
    for value in ({"a": comm.rank}, [comm.rank], None if comm.rank else "only rank 0 has this"):
        assert len(comm.all_gather_object(value)) == comm.world_size
        expected = {"a": 0} if isinstance(value, dict) else [0]
        expected = expected if isinstance(value, (dict, list)) else "only rank 0 has this"
        assert comm.broadcast_object(value) == expected


def check_groups(comm):
    rows = torch.arange(2.0 * comm.world_size).view(-1, 2)
    share = comm.reduce_scatter_async(rows * (comm.rank + 1), "share").wait()
    total = comm.world_size * (comm.world_size + 1) / 2
    assert share.tolist() == (rows[comm.rank] * total).tolist()
    parts = [torch.full((to + 1,), comm.rank, dtype=torch.uint8) for to in range(comm.world_size)]
    got = comm.all_to_all_async(parts, "parts").wait()
    assert [part.tolist() for part in got] == [
        [sender] * (comm.rank + 1) for sender in range(comm.world_size)
    ]
    pairs = [[rank, rank + 1] for rank in range(0, comm.world_size, 2)]
    pair = comm.split(pairs)
    joined = pair.all_gather_async(torch.tensor([comm.rank]), "pair").wait().tolist()
    assert joined == pairs[comm.rank // 2] and joined[pair.rank] == comm.rank
    assert len(set(comm.nodes())) == 1


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def factored(parameters):
    return FactoredAdam(parameters, lr=0.01, betas=(0.0, 0.999), min_compressed_numel=100)


def sketched(parameters):
    return SketchAdam(parameters, lr=0.01, betas=(0.0, 0.999), min_compressed_numel=100)


def train(comm, model, make_optimizer, compression, world_size):
    """Train; in the third step one rank has a gradient that is not a number."""
    model = copy.deepcopy(model)
    optimizer = DistributedOptimizer(
        make_optimizer(model.parameters()),
        model.named_parameters(),
        comm=comm,
        compression=compression,
        bucket_bytes=20_000,
    )
    generator = torch.Generator().manual_seed(3)
    for step in range(NUM_STEPS):
        inputs = torch.randn(world_size * BATCH, 40, generator=generator)
        labels = inputs[:, :10].argmax(1)
        mine = slice(comm.rank * BATCH, (comm.rank + 1) * BATCH)
        loss = nn.functional.cross_entropy(model(inputs[mine]), labels[mine])
        is_bad = step == 2 and comm.rank == world_size - 1
        (loss * float("nan") if is_bad else loss).backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert bool(optimizer.stats.skipped) == (step == 2) == torch.equal(before, after)
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def check_training(comm):
    """Real ranks agree to the bit with each other, and two, or torch's, with simulated ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10))
    sparse = {"density": 0.02, "min_numel": 100}
    for make, compression in (
        (sgd, None),
        (sgd, Compression(**sparse)),
        (sgd, Compression(**sparse, value_dtype="float16", clip_norm=1.0, velocity_dtype="int8")),
        (factored, Compression(**sparse, residual_dtype="bfloat16")),
        (factored, Compression(**sparse, residual_dtype="int8", share_statistics=math.inf)),
        (sketched, Compression(**sparse, preconditioning="early", momentum=0.5)),
        (factored, Compression(**sparse, preconditioning="after")),
        (
            sgd,
            Compression(
                **sparse,
                protocol="sparse_all_reduce",
                value_dtype="mxfp8",
                index_coding="elias_fano",
                merged_factor=1,
            ),
        ),
        (factored, Compression(**sparse, value_dtype="mxfp4", index_coding="elias_fano")),
        (factored, Compression(**sparse, two_level=True, ranks_per_island=comm.world_size // 2)),
        (
            sgd,
            Compression(
                **sparse,
                ranks_per_island=2,
                two_level=True,
                protocol="sparse_all_reduce",
                residual_dtype="int8",
            ),
        ),
    ):
        vector = train(comm, model, make, compression, comm.world_size)
        for other in comm.all_gather_object(vector):
            assert torch.equal(other, vector), "replicas differ"
        simulated = run_local(
            comm.world_size,
            lambda c, m=make, s=compression: train(c, model, m, s, c.world_size),
        )[comm.rank]
        if comm.world_size == 2 or isinstance(comm, TorchComm):  # of two: a + b is b + a
            assert torch.equal(vector, simulated), "differs from the simulation"
        torch.testing.assert_close(vector, simulated)


def check_elements(comm):
    """float64 and complex parameters, and rows of them, on the way that their ranks take."""
    grads = {
        "double": torch.full((40, 30), (comm.rank + 1) / 3, dtype=torch.float64),
        "complex": torch.full((30, 40), 1j * comm.rank + 1 / 3, dtype=torch.complex128),
        "float": torch.full((7,), comm.rank + 0.5),
        "rows": torch.full((6, 4), comm.rank + 1 / 3, dtype=torch.float64).to_sparse(1),
    }

    def train(comm, compression):
        named = {n: nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)) for n, g in grads.items()}
        optimizer = DistributedOptimizer(
            torch.optim.SGD(named.values(), lr=1.0), named.items(), comm=comm,
            compression=compression, row_sparse=["rows"],
        )  # fmt: skip
        for step in range(3):
            for name, parameter in named.items():
                parameter.grad = grads[name] * (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        return {name: parameter.detach() for name, parameter in named.items()}

    sparse = {"density": 0.05, "min_numel": 1}
    exact = train(comm, None)
    ranks = torch.arange(comm.world_size, dtype=torch.float64)
    expected = -6 * (ranks + 1).div(3).mean()
    torch.testing.assert_close(exact["double"][0, 0], expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(exact["complex"][0, 0].imag, -6 * ranks.mean(), rtol=1e-15, atol=0)
    torch.testing.assert_close(exact["rows"][5, 3], -6 * (ranks + 1 / 3).mean(), rtol=1e-15, atol=0)
    for protocol in ("gather", "sparse_all_reduce"):
        found = train(comm, Compression(**sparse, protocol=protocol))
        assert found["double"].count_nonzero() and found["complex"].imag.count_nonzero()
        for others in comm.all_gather_object(found):
            assert all(torch.equal(other, found[name]) for name, other in others.items())


with job() as comm:
    check_collectives(comm)
    check_groups(comm)
    check_training(comm)
    check_elements(comm)
    wanted = sys.argv[1]
    carrier = "torch" if isinstance(comm, TorchComm) else comm.controller
    assert carrier == wanted, f"{carrier} carries the job, not {wanted}"
    print(f"rank {comm.rank} of {comm.world_size} agrees", flush=True)
