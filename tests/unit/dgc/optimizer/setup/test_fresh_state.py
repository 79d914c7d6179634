"""State made before the first step: as what an optimizer makes itself, and of no effect."""

import copy
import inspect

import pytest
import torch
from torch import nn

from dgc import DistributedOptimizer
from dgc.comm.local import run_local
from dgc.optimizer.setup.fresh_state import fill_in
from optim import FactoredAdam

TORCHS = [
    kind
    for _, kind in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)  # which the exchange refuses
]
MAKERS = {
    **{kind.__name__: (lambda p, kind=kind: kind(p, lr=0.01)) for kind in TORCHS},
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD, dampened": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    "RMSprop, all": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "FactoredAdam": lambda p: FactoredAdam(p, lr=0.01, min_compressed_numel=0),
}
MAKES_NONE = ("SGD",)


def make_weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 5), (4, 3))]


def wrapped(name, comm, weights):
    named = list(zip("ab", weights, strict=True))
    rows = "ab" if name == "SparseAdam" else ""
    return DistributedOptimizer(MAKERS[name](weights), named, comm=comm, row_sparse=rows)


def train(optimizer, weights, is_sparse, num_steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=generator)
            weight.backward(gradient.to_sparse(1) if is_sparse else gradient)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_before_the_first_step_is_whole_and_changes_no_bit(name):
    def work(comm, looks):
        weights = make_weights()
        optimizer = wrapped(name, comm, weights)
        if looks:
            saved = copy.deepcopy(optimizer.state_dict())
            assert saved["state"]
            assert name in MAKES_NONE or saved["state"].keys() == {0, 1}
        train(optimizer, weights, name == "SparseAdam")
        after = optimizer.state_dict()
        if looks and name not in MAKES_NONE:  # what is filled in is what it has later
            shapes = [
                {key: getattr(value, "shape", None) for key, value in state["state"][0].items()}
                for state in (saved, after)
            ]
            assert shapes[0] == shapes[1]
        again = MAKERS[name](make_weights())
        again.load_state_dict(after)  # torch's own takes it too
        return weights, str(after)

    (looked,) = run_local(1, lambda comm: work(comm, True))
    (unlooked,) = run_local(1, lambda comm: work(comm, False))
    assert all(map(torch.equal, looked[0], unlooked[0]))
    assert looked[1] == unlooked[1]


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_from_a_checkpoint_of_before_the_first_step_is_the_same(name):
    def work(comm, resumes):
        weights = make_weights()
        optimizer = wrapped(name, comm, weights)
        if resumes:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, weights, name == "SparseAdam")
        return weights

    (resumed,) = run_local(1, lambda comm: work(comm, True))
    (once,) = run_local(1, lambda comm: work(comm, False))
    assert all(map(torch.equal, resumed, once))


def test_hooks_schedulers_and_gradients_do_not_notice():
    weights = make_weights()
    optimizer = torch.optim.Adam(weights, lr=0.01)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # counts the steps of this optimizer
    weights[0].grad = torch.ones_like(weights[0])
    before = copy.deepcopy((weights, optimizer.param_groups))
    fill_in(optimizer, weights)
    assert not called and not getattr(optimizer, "_opt_called", False)
    assert str((weights, optimizer.param_groups)) == str(before)
    assert weights[0].grad is not None and weights[1].grad is None
    state = optimizer.state[weights[0]]
    state["exp_avg"].fill_(7)
    fill_in(optimizer, weights)  # what is there stays
    assert optimizer.state[weights[0]] is state and state["exp_avg"].eq(7).all()


def test_an_optimizer_around_another_one_is_left_alone():
    class Around(torch.optim.Optimizer):
        def __init__(self, within):
            super().__init__(within.param_groups, {})
            self.within = within

        def step(self, closure=None):
            self.within.step()

    weights = make_weights()
    weights[0].grad = torch.ones_like(weights[0])
    before = weights[0].detach().clone()
    fill_in(Around(torch.optim.SGD(weights, lr=1.0)), weights)
    assert torch.equal(weights[0], before)


def test_a_step_that_asks_for_more_than_gradients_makes_no_state_and_no_failure():
    class NeedsClosure(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    weights = make_weights()
    optimizer = NeedsClosure(weights, lr=1.0, momentum=0.9)
    fill_in(optimizer, weights)
    assert not optimizer.state


def test_sparse_momentum_which_horovod_cannot_send_is_not_made():
    weights = make_weights()
    optimizer = torch.optim.SGD(weights, lr=1.0, momentum=0.9)
    fill_in(optimizer, weights, row_sparse=weights[:1])
    assert [id(p) for p in optimizer.state] == [id(weights[1])]
