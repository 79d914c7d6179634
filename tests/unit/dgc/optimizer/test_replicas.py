"""Ranks that differ in anything that must be equal are told so, in the first step."""

import copy

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.optimizer.replicas import checksum

START = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def adam(weights, **settings):
    return torch.optim.Adam(weights, lr=0.1, **settings)


def make(comm, optimizer=adam, dtype=torch.float32, **settings):
    weights = [nn.Parameter(START.to(dtype, copy=True)), nn.Parameter(START[0].clone())]
    inner = optimizer(weights)
    named = list(zip(("table", "bias"), weights, strict=True))
    return weights, DistributedOptimizer(inner, named, comm=comm, **settings)


def step(weights, optimizer):
    sum(w.square().sum() for w in weights).backward()
    optimizer.step()
    optimizer.zero_grad()


def expect(message, work, error=ValueError, world_size=3):
    """All ranks raise the same, and it names what differs."""

    def caught(comm):
        with pytest.raises(error, match=message) as raised:
            work(comm)
        return str(raised.value)

    assert len(set(run_local(world_size, caught))) == 1


def of(rank, comm, value, otherwise):
    return value if comm.rank == rank else otherwise


OPTIONS = {
    "lr": lambda g: g.update(lr=0.2),
    "lr of": lambda g: g.update(lr=torch.tensor(0.1)),
    "betas": lambda g: g.update(betas=(0.9, 0.99)),
    "weight_decay": lambda g: g.update(weight_decay=0.1),
    "maximize": lambda g: g.update(maximize=True),
    "decay_function": lambda g: g.update(decay_function=print),  # one that torch does not know
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_differ_are_named(name):
    def work(comm):
        weights, optimizer = make(comm)
        if comm.rank == 2:
            OPTIONS[name](optimizer.param_groups[0])
        step(weights, optimizer)

    option = name.removesuffix(" of")
    expect(rf"rank 0 and rank 2 differ in {option} of parameter group 0: .*broadcast_optim", work)


def test_momentum_that_differs_is_named():
    def sgd(comm):
        return lambda w: torch.optim.SGD(w, lr=0.1, momentum=of(1, comm, 0.5, 0.9))

    expect(
        "rank 0 and rank 1 differ in momentum of parameter group 0: 0.9 on rank 0, 0.5 on rank 1",
        lambda comm: step(*make(comm, sgd(comm), compression=Compression(density=0.1))),
    )


def test_optimizers_groups_and_dtypes_that_differ_are_named():
    def work(comm):
        step(*make(comm, of(1, comm, torch.optim.AdamW, adam)))

    expect("the class of the optimizer: torch.optim.adam.Adam on rank 0", work)

    def split(weights):
        return torch.optim.Adam([{"params": [w]} for w in weights], lr=0.1)

    expect(
        r"params of parameter group 0: \['table', 'bias'\] on rank 0, \['table'\] on rank 1",
        lambda comm: step(*make(comm, of(1, comm, split, adam))),
    )
    expect(
        r"\('table', \(8, 6\), 'torch.float32'\) where rank 1 has .*bfloat16",
        lambda comm: make(comm, dtype=of(1, comm, torch.bfloat16, torch.float32)),
    )


def loaded_state(**changes):
    weights = [nn.Parameter(START.clone()), nn.Parameter(START[0].clone())]
    optimizer = adam(weights)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    state = optimizer.state_dict()
    for key, change in changes.items():
        state["state"][1][key] = change(state["state"][1][key])
    return state


def one_bit(tensor):
    changed = tensor.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(9.0))
    return changed


@pytest.mark.parametrize("when", ["into the inner before", "before the first step", "in mid-run"])
@pytest.mark.parametrize(
    "changes, named",
    [({"exp_avg_sq": one_bit}, "exp_avg_sq of bias"), ({"step": lambda t: t + 1}, "step of bias")],
)
def test_loaded_state_that_differs_in_a_bit_is_named(when, changes, named):
    def work(comm):
        state = loaded_state(**of(1, comm, changes, {}))

        def inner(weights):
            optimizer = adam(weights)
            if when == "into the inner before":
                optimizer.load_state_dict(state)
            return optimizer

        weights, optimizer = make(comm, inner)
        if when == "in mid-run":
            step(weights, optimizer)
        if when != "into the inner before":
            optimizer.load_state_dict(state)
        step(weights, optimizer)

    expect(f"rank 0 and rank 1 differ in optimizer state: {named}", work)


def test_state_that_one_rank_lacks_is_named_with_the_remedy():
    def work(comm):
        weights, optimizer = make(comm)
        if comm.rank == 0:
            optimizer.load_state_dict(loaded_state())
        step(weights, optimizer)

    expect(
        "differ in optimizer state: .* of table: .* not there on rank 1; load the state on", work
    )


def test_parameters_that_a_forward_pass_writes_are_refused_with_the_reason():
    def work(comm):
        torch.manual_seed(0)
        table = nn.Embedding(50, 16, max_norm=1.0)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(table.parameters(), lr=0.1), table.named_parameters(), comm=comm
        )
        table(torch.arange(5) + 5 * comm.rank).sum().backward()
        optimizer.step()

    expect("parameter weight: .*forward pass writes its parameters.*max_norm", work)


def test_a_model_loaded_on_one_rank_after_is_refused_and_equal_ranks_are_not():
    def work(comm, is_alike):
        weights, optimizer = make(comm)
        step(weights, optimizer)
        if comm.rank == 0 or is_alike:
            weights[0].data.add_(1)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            optimizer.load_state_dict(optimizer.state_dict())
        step(weights, optimizer)
        optimizer.check_replicas()
        return True

    expect("parameter table: .*A model loaded on one rank", lambda comm: work(comm, False))
    assert run_local(3, lambda comm: work(comm, True)) == [True] * 3


def test_own_loops_can_check_their_replicas():
    def work(comm):
        weights, optimizer = make(comm)
        step(weights, optimizer)
        optimizer.check_replicas()
        if comm.rank == 1:
            weights[1].data[3] += 1e-6
        optimizer.check_replicas()

    expect("rank 0 and rank 1 differ in parameter bias", work, RuntimeError)


class Recording:
    """A comm that notes the names of what it gathers."""

    def __init__(self, comm):
        self._comm, self.names = comm, []

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def all_gather_async(self, tensor, name):
        self.names.append(name)
        return self._comm.all_gather_async(tensor, name)


def test_it_costs_one_small_collective_in_those_steps_only_and_its_name_says_why():
    def work(comm):
        comm = Recording(comm)
        weights, optimizer = make(comm)
        for number in range(6):
            if number == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step(weights, optimizer)
        return comm.names

    names = [
        "replicas0.compared_in_the_first_step",
        "replicas0.compared_in_the_first_step_after_load_state_dict",
    ]
    assert run_local(2, work) == [names] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_a_checksum_is_of_elements_not_of_strides(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tensor = (100 * torch.randn(37, 5, 4, generator=generator)).to(dtype)
    whole = checksum(tensor)
    assert checksum(tensor.transpose(0, 2).contiguous().transpose(0, 2)) == whole
    monkeypatch.setattr("dgc.optimizer.replicas._PIECE_BYTES", 48)  # in many pieces
    assert checksum(tensor) == whole
    assert checksum(tensor.transpose(0, 2).contiguous().transpose(0, 2)) == whole
    tensor[36, 4, 3] += 1
    assert checksum(tensor) != whole
    assert checksum(torch.tensor(3.0)) != checksum(torch.tensor(4.0))
    assert checksum(torch.zeros(0, 3)) == 0
    rows = torch.eye(4).to_sparse(1)
    assert checksum(rows) == checksum(torch.eye(4).to_sparse(1)) != checksum(2 * rows)
