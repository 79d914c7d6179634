"""What a rank's gradient is, whoever put it into `p.grad`, and in however many threads."""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.exchange.route import Route
from dgc.exchange.step import Step
from optim import FactoredAdam
from parsimony_kernels.step import ops
from tests.unit.dgc.method import NO_FIRST, assert_equal

ROWS, DIM = 40, 30
SPARSE = {"density": 0.05, "min_numel": 1}


def _make_models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(40, 40, bias=False) for _ in range(8)]
        branches = nn.ModuleList([nn.Sequential(*layers[:4]), nn.Sequential(*layers[4:])])
        return nn.Sequential(nn.Embedding(ROWS, DIM, sparse=True), nn.Linear(DIM, DIM)), branches


MODEL, BRANCHES = _make_models()  # here, since workers are threads that share the random state


def make_model():
    return copy.deepcopy(MODEL)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def factored(parameters):
    return FactoredAdam(parameters, lr=0.1, betas=NO_FIRST, min_compressed_numel=0)


def loss_of(model, generator, num_words=9):
    return model(torch.randint(ROWS, (num_words,), generator=generator)).square().sum()


def by_backward(model, loss):
    loss.backward()


def by_hand(model, loss):
    parameters = list(model.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def wrap(comm, model, make=sgd, compression=None, **settings):
    return DistributedOptimizer(
        make(model.parameters()), model.named_parameters(), comm=comm, compression=compression,
        row_sparse=["0.weight"], **settings,
    )  # fmt: skip


@pytest.mark.parametrize("only_rank", [None, 1])
@pytest.mark.parametrize(
    ("make", "compression"),
    [
        (sgd, None),
        (sgd, Compression(density=1.0, clip_norm=0.1, clip_scope="tensor")),
        (sgd, Compression(density=1.0, clip_norm=0.1)),
        (sgd, Compression(**SPARSE, protocol="gather", value_dtype="mxfp4")),
        (factored, Compression(**SPARSE, protocol="sparse_all_reduce", clip_norm=0.1)),
        (factored, Compression(**SPARSE, preconditioning="early", momentum=0.9, two_level=True)),
    ],
)
def test_gradients_put_into_p_grad_are_exchanged_as_those_of_backward(make, compression, only_rank):
    def work(comm, give):
        model, generator = make_model(), torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, make, compression)
        for _ in range(3):
            optimizer.zero_grad()
            if only_rank in (None, comm.rank):
                give(model, loss_of(model, generator))
            optimizer.step()
        assert not torch.equal(model[0].weight, make_model()[0].weight)
        return copy.deepcopy((model.state_dict(), optimizer.worker_state_dict()))

    hand, hooks = (
        run_local(4, lambda c, g=give: work(c, g), ranks_per_node=2)
        for give in (by_hand, by_backward)
    )
    assert_equal(hand, hooks)
    assert_equal(hand[0][0], hand[1][0])


def test_micro_batches_by_hand_or_first_by_hand_sum_to_the_steps_gradient():
    def with_graph(model, loss):  # autograd then adds out of place
        loss.backward(create_graph=True)

    def work(comm, *gives):
        model, generator = make_model(), torch.Generator().manual_seed(0)
        optimizer = wrap(comm, model, micro_batches_per_step=2)
        for give in gives:
            give(model, loss_of(model, generator))
        optimizer.step()
        return model.state_dict()

    expected = run_local(1, lambda comm: work(comm, by_backward, by_backward))
    for gives in ((by_hand, by_hand), (by_hand, by_backward), (with_graph, with_graph)):
        for name, value in run_local(1, lambda comm, g=gives: work(comm, *g))[0].items():
            torch.testing.assert_close(value, expected[0][name])


def test_a_gradient_by_hand_takes_the_place_of_backwards_until_that_has_left():
    def work(comm, micro_batches):
        first, last = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = DistributedOptimizer(
            sgd([first, last]), [("first", first), ("last", last)], comm=comm, bucket_bytes=1,
            micro_batches_per_step=micro_batches,
        )  # fmt: skip
        (first.sum() + last.sum()).backward()
        first.grad = torch.full((3,), 2.0)  # its bucket is the last, and leaves in step()
        optimizer.step()
        assert torch.equal(first.detach(), torch.full((3,), 0.8))
        assert torch.equal(last.detach(), torch.full((3,), 0.9))
        optimizer.zero_grad()
        (first.sum() + last.sum()).backward()
        last.grad = torch.ones(3)
        if micro_batches == 2:  # nothing has left
            optimizer.step()
            return
        with pytest.raises(RuntimeError, match="p.grad of last was set after back.*autograd.grad"):
            optimizer.step()

    run_local(1, lambda comm: work(comm, 1))
    run_local(1, lambda comm: work(comm, 2))


def test_where_gradients_stay_they_may_be_changed_until_the_step():
    def work(comm):
        weight = nn.Parameter(torch.ones(3))
        optimizer = DistributedOptimizer(
            sgd([weight]), [("w", weight)], comm=comm,
            compression=Compression(density=1.0, clip_norm=math.inf),
        )  # fmt: skip
        weight.sum().backward()
        weight.grad = weight.grad * (comm.rank + 2)
        optimizer.step()
        return weight.detach()

    for weight in run_local(2, work):
        assert torch.equal(weight, torch.full((3,), 0.75))


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
@pytest.mark.parametrize("two_level", [False, True])
def test_gradients_of_inference_mode_and_those_with_a_graph_are_taken(
    implementation, clip_scope, two_level
):
    """Evolution strategies make the first kind, whose memory may not be written again."""

    def work(comm):
        weight = nn.Parameter(torch.ones(30, 40))
        optimizer = DistributedOptimizer(
            torch.optim.Adam([weight]), [("w", weight)], comm=comm,
            compression=Compression(**SPARSE, clip_norm=0.1, clip_scope=clip_scope,
                                    two_level=two_level),
        )  # fmt: skip
        for _ in range(3):
            with torch.inference_mode():
                grad = torch.arange(1200.0).view(30, 40)
            weight.grad = grad
            del grad
            optimizer.step()
            loss = (weight.square() * torch.arange(1200.0).view(30, 40)).sum()
            weight.grad = torch.autograd.grad(loss, weight, create_graph=True)[0]
            assert weight.grad.requires_grad
            optimizer.step()
        assert not weight.grad.requires_grad
        return weight.detach()

    with ops.use(implementation):
        first, *others = run_local(4, work, ranks_per_node=2)
    assert not torch.equal(first, torch.ones(30, 40))
    assert all(torch.equal(first, other) for other in others)


def test_gradients_by_hand_are_unscaled_as_others():
    def work(comm):
        weight = nn.Parameter(torch.ones(3))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = DistributedOptimizer(sgd([weight]), [("w", weight)], comm=comm,
                                         grad_scaler=scaler)  # fmt: skip
        weight.grad = scaler.scale(torch.ones(3))
        scaler.step(optimizer)
        scaler.update()
        return weight.detach()

    assert torch.equal(run_local(1, work)[0], torch.full((3,), 0.9))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_dense_gradient_by_hand_for_rows_is_refused(clip_norm):
    def work(comm):
        model = make_model()
        optimizer = wrap(comm, model, compression=Compression(density=1.0, clip_norm=clip_norm))
        model[0].weight.grad = torch.ones(ROWS, DIM)
        with pytest.raises(TypeError, match="0.weight has a dense gradient; do not name it in row"):
            optimizer.step()

    run_local(1, work)


def test_a_mean_that_was_left_in_p_grad_is_applied_again_as_in_torch():
    def work(comm, wraps):
        weight = nn.Parameter(torch.ones(3))
        optimizer = sgd([weight])
        if wraps:
            optimizer = DistributedOptimizer(optimizer, [("w", weight)], comm=comm)
        (weight * (2 * comm.rank)).sum().backward()
        if not wraps:
            weight.grad = torch.ones(3)  # the mean of 0 and 2
        for _ in range(3):
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        return weight.detach()

    assert_equal(*(run_local(2, lambda comm, w=w: work(comm, w)) for w in (True, False)))


@pytest.mark.parametrize("clip_norm", [None, 1e9])
@pytest.mark.parametrize(
    "compression",
    [
        {"density": 1.0, "momentum": 0.9},
        {"density": 1.0, "update_scale": 3.0, "preconditioning": "late"},
        {**SPARSE, "preconditioning": "after"},
    ],
)
def test_an_update_that_was_left_in_p_grad_is_no_gradient_until_it_is_changed(
    compression, clip_norm
):
    """It has been applied: sent again it would join the residual, the velocity, the statistic."""

    def make(parameters):
        return FactoredAdam(parameters, lr=0.1, betas=(0.0, 0.9), min_compressed_numel=0)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.1)

    def work(comm, clears, changes):
        weight = nn.Parameter(torch.ones(40, 40))
        optimizer = DistributedOptimizer(
            (make if "update_scale" in compression else sgd if "momentum" in compression else adam)(
                [weight]
            ),
            [("w", weight)], comm=comm, compression=Compression(**compression, clip_norm=clip_norm),
        )  # fmt: skip
        weight.sum().backward()
        for _ in range(3):
            optimizer.step()
            if changes:
                weight.grad.copy_(torch.arange(1600.0).view(40, 40))
            elif clears:
                optimizer.zero_grad()
        return weight.detach(), optimizer.worker_state_dict()

    left, cleared = (run_local(2, lambda comm, c=c: work(comm, c, False)) for c in (False, True))
    assert_equal(left, cleared)
    assert not torch.equal(run_local(2, lambda comm: work(comm, False, True))[0][0], left[0][0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_in_two_threads_is_that_of_one_to_the_bit(world_size, monkeypatch):
    """Autograd has a thread for each device. Buckets started twice, or generators collided."""
    give_way(monkeypatch, Step, "accumulate", "read", "bad_tensors")
    give_way(monkeypatch, Route, "name")

    def train(comm, in_threads):
        generator = torch.Generator().manual_seed(comm.rank)
        branches = copy.deepcopy(BRANCHES)
        named = sorted(branches.named_parameters(), key=lambda pair: pair[0][1:])
        optimizer = DistributedOptimizer(
            torch.optim.SGD(branches.parameters(), lr=0.01, momentum=0.9), named, comm=comm,
            bucket_bytes=1, compression=Compression(**SPARSE, protocol="gather"),
        )  # fmt: skip
        for _ in range(3):
            optimizer.zero_grad()
            losses = [part(torch.randn(8, 40, generator=generator)).sum() for part in branches]
            with ThreadPoolExecutor(len(losses) if in_threads else 1) as threads:
                list(threads.map(torch.Tensor.backward, losses))
            optimizer.step()
        state = optimizer.worker_state_dict()
        state.pop("order")  # in which the first gradients came
        return copy.deepcopy((dict(named), state))

    two, one = (run_local(world_size, lambda comm, t=t: train(comm, t)) for t in (True, False))
    assert_equal(two, one)


def give_way(monkeypatch, owner, *names):
    """Let other threads run whenever one of a class's methods is called."""
    for name in names:
        method = getattr(owner, name)

        def slowly(*arguments, _method=method, **settings):
            time.sleep(1e-4)
            return _method(*arguments, **settings)

        monkeypatch.setattr(owner, name, slowly)
