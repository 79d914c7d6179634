"""Run by test_resume.py on real ranks: a checkpoint that rank 0 alone loads and sends."""

import copy
import inspect

import torch
from torch import nn

import optim
from dgc import Compression, DistributedOptimizer
from dgc.comm import HorovodComm
from dgc.comm.job import job

SPARSE = Compression(density=0.1, min_numel=100)
TORCHS = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)
]
FACTORED = {"betas": (0.0, 0.999), "min_compressed_numel": 0}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


CASES = [  # an optimizer, and how its gradients are exchanged
    *((lambda p, kind=kind: kind(p, lr=0.01), None) for kind in TORCHS),
    (sgd, None),
    (sgd, SPARSE),
    (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), None),
    (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True), SPARSE),
    (lambda p: optim.FactoredAdam(p, lr=0.01, **FACTORED), SPARSE),
    (lambda p: optim.FactoredAdam(p, lr=0.01, min_compressed_numel=0), SPARSE),
    (lambda p: optim.FactoredAdam(p, lr=0.01, min_compressed_numel=0), None),
    (lambda p: optim.SM3(p, lr=0.01, momentum=0.9), None),
    (lambda p: optim.SketchMomentum(p, lr=0.01, min_compressed_numel=0), None),
]


class Run:
    """A small network, its optimizer around `make`'s, and steps on data of this rank."""

    def __init__(self, comm, make, compression, before=None):
        """before: a state to be loaded into the optimizer before it is wrapped."""
        self.rank, self.model = comm.rank, nn.Linear(20, 30, bias=False)
        self.is_sparse = isinstance(make([nn.Parameter(torch.zeros(1, 1))]), torch.optim.SparseAdam)
        inner = make(self.model.parameters())
        if before is not None:
            inner.load_state_dict(before)
        self.optimizer = DistributedOptimizer(
            inner, self.model.named_parameters(), comm=comm, compression=compression,
            row_sparse=["weight"] if self.is_sparse else (),
        )  # fmt: skip

    def steps(self, first, count):
        for number in range(first, first + count):
            generator = torch.Generator().manual_seed(100 * number + self.rank)
            self.optimizer.zero_grad()
            if self.is_sparse:
                gradient = torch.randn(30, 20, generator=generator).to_sparse(1)
                self.model.weight.backward(gradient)
            else:
                self.model(torch.randn(8, 20, generator=generator)).square().mean().backward()
            self.optimizer.step()
        return self

    def load(self, model, state):
        self.model.load_state_dict(model)
        if state is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state))

    def end(self):
        self.optimizer.check_replicas()
        self.optimizer.close()
        (group,) = self.optimizer.param_groups
        options = {name: value for name, value in group.items() if name != "params"}
        return self.model.weight.detach(), options


def broadcast(comm, run):
    """Give rank 0's model and optimizer to all: as Horovod's users do, or those of torch."""
    if isinstance(comm, HorovodComm):
        import horovod.torch as hvd

        hvd.broadcast_parameters(run.model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(run.optimizer, root_rank=0)
    else:
        for part in (run.model, run.optimizer):
            part.load_state_dict(comm.broadcast_object(part.state_dict()))


def check(comm, make, compression, is_loaded_before):
    """Rank 0 loads and broadcasts, or every rank loads: the same afterwards, to the bit."""
    torch.manual_seed(comm.rank)
    run = Run(comm, make, compression).steps(0, 3)
    run.optimizer.param_groups[0]["lr"] *= 0.5  # as a scheduler does
    run.steps(3, 1)
    model, state = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    run.end()

    everyone = Run(comm, make, compression)
    everyone.load(model, state)
    expected = everyone.steps(4, 3).end()

    before = state if is_loaded_before and comm.rank == 0 else None
    resumed = Run(comm, make, compression, before)
    if comm.rank == 0:
        resumed.load(model, None if is_loaded_before else state)
    broadcast(comm, resumed)
    weight, options = resumed.steps(4, 3).end()
    what = type(resumed.optimizer.inner).__name__, compression
    assert torch.equal(weight, expected[0]), what
    assert options == expected[1], what


def check_a_dense_checkpoint(comm):
    """Rank 0 alone loads what plain SGD saved, with momentum buffers, into a compressed run."""
    weight = nn.Parameter(torch.ones(30, 20))
    plain = torch.optim.SGD([weight], lr=0.1, momentum=0.9)  # the options go along, too
    weight.grad = torch.ones_like(weight)
    plain.step()
    run = Run(comm, sgd, Compression(density=1.0))
    if comm.rank == 0:
        run.load({"weight": weight.detach()}, plain.state_dict())
    broadcast(comm, run)
    (run.model.weight * 0).sum().backward()
    run.optimizer.step()
    weight.grad = torch.zeros_like(weight)
    plain.step()
    torch.testing.assert_close(run.end()[0], weight.detach())


with job() as comm:
    for make, compression in CASES:
        check(comm, make, compression, is_loaded_before=False)
    for make, compression in ((sgd, SPARSE), (sgd, None), (TORCHS[4], None)):
        check(comm, make, compression, is_loaded_before=True)
    check_a_dense_checkpoint(comm)
    print(f"rank {comm.rank} of {comm.world_size} resumes", flush=True)
