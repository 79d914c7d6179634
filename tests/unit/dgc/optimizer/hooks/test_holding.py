"""close(), making anew, and two optimizers for one parameter."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import FactoredAdam
from tests.tolerances import assert_close

SPARSE = Compression(density=0.05, min_numel=100, exact_below=0)


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 100), nn.Tanh(), nn.Linear(100, 5))


MODEL = make_model()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def factored(parameters, **settings):
    settings = {"betas": (0.0, 0.999), "min_compressed_numel": 0, **settings}
    return FactoredAdam(parameters, lr=0.01, **settings)


def wrap(inner, model, comm, compression=SPARSE):
    return DistributedOptimizer(inner, model.named_parameters(), comm=comm, compression=compression)


def batch(step, rank):
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model, optimizer, steps, rank):
    for step in steps:
        inputs = batch(step, rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), inputs[:, :5].argmax(1)).backward()
        optimizer.step()


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("make", [sgd, factored])
def test_closed_and_made_anew_with_what_the_workers_had_goes_on_to_the_bit(make):
    def work(comm, is_made_anew):
        model = copy.deepcopy(MODEL)
        inner = make(model.parameters())
        optimizer = wrap(inner, model, comm)
        train(model, optimizer, range(6), comm.rank)
        if is_made_anew:
            saved = copy.deepcopy(optimizer.worker_state_dict())
            optimizer.close()
            optimizer = wrap(inner, model, comm)
            optimizer.load_worker_state_dict(saved)
        train(model, optimizer, range(6, 12), comm.rank)
        return vector(model)

    once = run_local(2, lambda comm: work(comm, False))
    anew = run_local(2, lambda comm: work(comm, True))
    assert torch.equal(once[0], anew[0]) and torch.equal(once[1], anew[1])


@pytest.mark.parametrize("make", [sgd, factored])
def test_what_workers_had_is_carried_over_when_parameters_are_added(make):
    def work(comm):
        model = copy.deepcopy(MODEL)
        model[2].requires_grad_(False)
        inner = make(model[0].parameters())
        optimizer = wrap(inner, model, comm)
        train(model, optimizer, range(6), comm.rank)
        model[2].requires_grad_(True)
        inputs = batch(0, comm.rank)
        with pytest.raises(NotImplementedError, match=r"worker_state_dict\(\) returned is given"):
            optimizer.add_param_group({"params": list(model[2].parameters())})
        saved = copy.deepcopy(optimizer.worker_state_dict())
        optimizer.close()
        inner.add_param_group({"params": list(model[2].parameters())})
        optimizer = wrap(inner, model, comm)
        optimizer.load_worker_state_dict(saved)
        carried = optimizer.worker_state_dict()
        for kind, before in (
            ("residual", saved["compensation"]["residual"]),
            ("velocity", saved["compensation"]["velocity"]),
        ):
            for name, tensor in before.items():
                assert torch.equal(carried["compensation"][kind][name], tensor)
        for name, parts in saved["statistics"].items():
            assert str(carried["statistics"][name]) == str(parts)
        if make is factored:
            assert saved["statistics"].keys() == {"0.weight"}
            assert int(carried["statistics"]["2.weight"]["step"]) == 0
        train(model, optimizer, range(6, 60), comm.rank)
        return nn.functional.cross_entropy(model(inputs), inputs[:, :5].argmax(1)).item()

    assert max(run_local(2, work)) < 1.0  # guessing: 1.6


def test_a_state_that_lacks_the_statistics_of_tensors_that_it_knows_is_refused():
    def work(comm):
        model = copy.deepcopy(MODEL)
        optimizer = wrap(factored(model.parameters()), model, comm)
        train(model, optimizer, range(2), comm.rank)
        saved = optimizer.worker_state_dict()
        del saved["statistics"]["0.weight"]
        with pytest.raises(ValueError, match=r"the saved statistic of 0.weight is None"):
            optimizer.load_worker_state_dict(saved)

    run_local(1, work)


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.999)])
def test_a_closed_ones_optimizer_begins_anew_where_the_workers_had_the_second_moment(betas):
    def work(comm):
        model = copy.deepcopy(MODEL)
        inner = factored(model.parameters(), betas=betas)
        optimizer = wrap(inner, model, comm)
        train(model, optimizer, range(20), comm.rank)
        optimizer.close()
        optimizer.close()  # once is enough
        with pytest.raises(RuntimeError, match=r"step\(\) after close\(\)"):
            optimizer.step()
        other = copy.deepcopy(model)
        train(model, inner, [20], comm.rank)
        train(other, factored(other.parameters(), betas=betas), [20], comm.rank)
        for place in (0, 2):  # as a fresh one: no bias correction of a later step
            assert torch.equal(model[place].weight, other[place].weight)
            assert not torch.equal(model[place].bias, other[place].bias)  # goes on
        train(model, wrap(inner, model, comm), range(21, 24), comm.rank)
        return vector(model)

    (one,) = run_local(1, work)
    assert one.isfinite().all()


@pytest.mark.parametrize("when", ["before wrapping", "after"])
def test_a_plain_runs_checkpoint_goes_on_with_its_second_moments(when):
    """With one worker and all entries sent, late preconditioning is the optimizer itself."""
    alone = copy.deepcopy(MODEL)
    plain = factored(alone.parameters())
    train(alone, plain, range(5), 0)
    saved, start = copy.deepcopy(plain.state_dict()), copy.deepcopy(alone)
    train(alone, plain, range(5, 10), 0)

    def work(comm):
        model = copy.deepcopy(start)
        inner = factored(model.parameters())
        if when == "before wrapping":
            inner.load_state_dict(saved)
        optimizer = wrap(inner, model, comm, Compression(density=1.0, min_numel=100))
        if when == "after":
            optimizer.load_state_dict(saved)
        train(model, optimizer, range(5, 10), 0)
        return vector(model)

    (resumed,) = run_local(1, work)
    assert_close(resumed, vector(alone))


def test_a_checkpoint_without_second_moments_says_where_to_load_it():
    def work(comm):
        model = copy.deepcopy(MODEL)
        optimizer = wrap(factored(model.parameters()), model, comm)
        train(model, optimizer, range(2), comm.rank)
        saved = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="Make the DistributedOptimizer first, and load the"):
            factored(model.parameters()).load_state_dict(saved)
        optimizer.close()
        wrap(factored(model.parameters()), model, comm).load_state_dict(saved)

    run_local(1, work)


def test_a_second_optimizer_on_the_same_parameters_is_refused_until_the_first_lets_go():
    def work(comm):
        model = copy.deepcopy(MODEL)
        first = wrap(sgd(model.parameters()), model, comm)
        for held in (model, model[2]):  # or some of them
            with pytest.raises(ValueError, match=r"held by another .* close\(\) that one first"):
                wrap(sgd(held.parameters()), held, comm)
        first.close()
        second = wrap(sgd(model.parameters()), model, comm)
        train(model, second, range(2), comm.rank)
        del second, first
        gc.collect()
        third = wrap(sgd(model.parameters()), model, comm)  # nobody could close the second
        train(model, third, range(2), comm.rank)
        copied = copy.deepcopy(MODEL)
        train(copied, wrap(sgd(copied.parameters()), copied, comm), range(2), comm.rank)

    run_local(2, work)


def test_an_optimizer_and_a_model_that_nobody_has_any_more_leave_no_memory_behind():
    left = []

    def work(comm):
        model = copy.deepcopy(MODEL)
        optimizer = wrap(sgd(model.parameters()), model, comm)
        train(model, optimizer, range(2), comm.rank)
        left.extend(map(weakref.ref, (optimizer, optimizer._exchange, *model.parameters())))

    run_local(1, work)
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


def test_one_that_could_not_be_made_leaves_the_optimizer_as_it_was():
    def work(comm):
        model = copy.deepcopy(MODEL)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        groups[1]["weight_decay"] = 0.1  # within the gradient
        inner = factored(groups)
        train(model, inner, range(3), 0)
        before = state_of(inner)
        with pytest.raises(ValueError, match="decoupled_weight_decay=True"):
            wrap(inner, model, comm)
        assert state_of(inner) == before
        inner.param_groups[1]["weight_decay"] = 0.0
        wrap(inner, model, comm).close()
        assert state_of(inner) == before

    def state_of(inner):
        states = inner.state_dict()["state"]
        return {(i, key): value.tolist() for i in states for key, value in states[i].items()}

    run_local(1, work)
