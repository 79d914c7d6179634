"""Run by test_horovod_habits.py: what Horovod's own tests ask of its DistributedOptimizer, of ours.

Written anew after horovod/test/parallel/test_torch.py (0.28), under its tests' names; where ours
differs, the README's table for people who come from Horovod says so, and the function here shows
it. test_broadcast_state is check_resume.py; test_model_parallelism needs two GPUs a rank.
"""

import itertools
import warnings

import horovod.torch as hvd
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm import HorovodComm


def linear(inputs=4, outputs=3):
    return nn.Linear(inputs, outputs)


def vector(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def assert_replicas_equal(module):
    for other in hvd.allgather_object(vector(module)):
        assert torch.equal(other, vector(module))


def refused(error, function, words):
    try:
        function()
    except error as message:
        assert words in str(message), message
    else:
        raise AssertionError(f"nothing was refused with {words!r}")


def test_broadcast_state_options(comm):
    """Ranks begin with other options. Horovod's test steps so; ours stops, until they are alike."""

    def make():
        model = linear()
        options = {"lr": 0.1, "momentum": 0.8} if comm.rank == 0 else {"lr": 0.2, "momentum": 0.9}
        inner = torch.optim.SGD(model.parameters(), nesterov=comm.rank == 0, **options)
        return model, DistributedOptimizer(inner, model.named_parameters(), comm=comm)

    model, optimizer = make()
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.8, True)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert_replicas_equal(model)
    model, optimizer = make()
    model(torch.randn(5, 4)).sum().backward()
    refused(ValueError, optimizer.step, "broadcast_optimizer_state")


def test_broadcast_state_no_grad(comm):
    """A parameter that requires no gradient, of integers. No gradients are made on the way."""
    model = nn.Module()
    model.indices = nn.Parameter(torch.tensor([1, 3]), requires_grad=False)
    model.values = nn.Parameter(torch.rand(4))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), comm=comm)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert model.indices.grad is None and model.values.grad is None
    (model.values[model.indices] * comm.rank).sum().backward()
    optimizer.step()
    same = hvd.allgather_object(model.values.detach())
    assert torch.equal(*same)


def test_force_allreduce(comm):
    """Ranks whose losses reach other layers step all of them."""
    for density in (1.0, 0.2):
        trunk, heads = linear(4, 6), nn.ModuleList([linear(6, 2), linear(6, 2)])
        model = nn.ModuleList([trunk, heads])
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1),
            model.named_parameters(), comm=comm,
            compression=Compression(density=density, min_numel=1),
        )  # fmt: skip
        before = vector(heads[1 - comm.rank])
        heads[comm.rank](trunk(torch.randn(5, 4))).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before, vector(heads[1 - comm.rank]))
        assert_replicas_equal(model)


def test_delta_optimizer(comm):
    model = linear()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(
        ValueError, lambda: DistributedOptimizer(inner, comm=comm, op=hvd.Adasum), "Adasum has no"
    )


def test_duplicate_names(comm):
    nets = nn.ModuleList([linear(), linear()])
    named = itertools.chain(*(net.named_parameters() for net in nets))
    inner = torch.optim.SGD(nets.parameters(), lr=0.1)
    refused(ValueError, lambda: DistributedOptimizer(inner, named, comm=comm), "names must be uniq")


def test_dynamic_requires_grad(comm):
    """Two networks take turns. What moves tells who trains: p.grad does not wait for step()."""
    nets = {"generator": linear(3, 4), "discriminator": linear(4, 1)}
    optimizers = {
        name: DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters(), comm=comm
        )
        for name, net in nets.items()
    }
    for trained in 5 * ["generator", "discriminator"]:
        before = {name: vector(net) for name, net in nets.items()}
        for name, net in nets.items():
            net.requires_grad_(name == trained)
            optimizers[name].zero_grad()
        nets["discriminator"](nets["generator"](torch.rand(5, 3))).sum().backward()
        optimizers[trained].step()
        for name, net in nets.items():
            assert torch.equal(before[name], vector(net)) == (name != trained)
            assert_replicas_equal(net)


def clipped(comm):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 0.5), nn.init.zeros_(model.bias)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(inner, model.named_parameters(), comm=comm)
    (model(torch.ones(1, 1)) - 1 - comm.rank).square().sum().backward()
    return model, optimizer


def test_gradient_clipping(comm):
    model, optimizer = clipped(comm)
    optimizer.synchronize()
    prior = model.weight.grad.item()
    assert prior == -1.0 * (1 + 3) / 2  # of both ranks
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert abs(model.weight.grad.item()) < 0.1
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_replicas_equal(model)
    by_wrapper, optimizer = clipped(comm)
    norm = optimizer.clip_grad_norm_(0.1)
    assert torch.isclose(norm, torch.tensor(8.0).sqrt())
    optimizer.step()
    torch.testing.assert_close(vector(by_wrapper), vector(model))


def test_synchronize_step_warning(comm):
    """Horovod warns, as its step() would exchange once more. Ours never does."""
    model, optimizer = clipped(comm)
    refused(RuntimeError, lambda: optimizer.skip_synchronize().__enter__(), "a synchronize() befo")
    optimizer.synchronize()
    clipped_to = 0.1 * model.weight.grad.sign()
    model.weight.grad = clipped_to.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert not caught
    torch.testing.assert_close(model.weight.detach(), 0.5 - 0.1 * clipped_to)


def test_no_named_parameters(comm):
    model = nn.Sequential(linear(4, 4), linear(4, 2))
    optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), comm=comm)
    before = vector(model)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, vector(model))
    assert_replicas_equal(model)


def test_missing_named_parameters(comm):
    model = linear()
    some = list(model.named_parameters())[:1]
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(ValueError, lambda: DistributedOptimizer(inner, some, comm=comm), "named_parameters la")


def test_sparse_embeddings(comm):
    """Rows are found without being named; ranks may even have gradients of others, or none."""
    for inner in (torch.optim.SparseAdam, torch.optim.SGD):
        table = nn.Embedding(10, 3, sparse=True)
        optimizer = DistributedOptimizer(inner(list(table.parameters()), lr=0.1), comm=comm)
        words = [[1, 2, 4, 5], [4, 3, 2, 9]] if comm.rank == 0 else [[1, 3, 4], [4, 7, 9]]
        for step in range(3):
            before = vector(table).view(10, 3)
            if step < 2 or comm.rank == 0:
                table(torch.tensor(words)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = (vector(table).view(10, 3) != before).any(dim=1)
            mine = {1, 2, 3, 4, 5, 9} | (set() if step == 2 else {7})
            assert set(moved.nonzero().view(-1).tolist()) == mine
        assert optimizer.stats.row_bytes
        assert_replicas_equal(table)


hvd.init()
torch.manual_seed(hvd.rank())
COMM = HorovodComm()
for name, test in sorted(globals().items()):
    if name.startswith("test_"):
        test(COMM)
print(f"rank {hvd.rank()} of {hvd.size()} has Horovod's habits", flush=True)
