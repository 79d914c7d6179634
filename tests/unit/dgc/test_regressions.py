"""Mistakes that were made once: how the method meets a person's loop and options."""

import gc
import weakref

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import Adam, FactoredAdam, SketchAdagrad, SketchMomentum
from tests.tolerances import assert_close
from tests.unit.dgc.method import NO_FIRST

N, M = 30, 40
SPARSE = {"density": 0.01, "min_numel": 1}


def wrap(comm, make, weight=None, compression=None, **settings):
    weight = nn.Parameter(torch.zeros(N, M)) if weight is None else weight
    optimizer = DistributedOptimizer(
        make([weight]), [("w", weight)], comm=comm,
        compression=compression or Compression(**SPARSE), **settings,
    )  # fmt: skip
    return weight, optimizer


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def factored(params, **settings):
    return FactoredAdam(params, lr=0.1, betas=NO_FIRST, min_compressed_numel=0, **settings)


def give(optimizer, weight, grad):
    weight.backward(grad)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("clip_scope", ["global", "tensor"])
def test_a_grad_scaler_that_was_not_given_is_refused(clip_scope):
    """Scaled gradients were applied as they were, a thousand times too large."""

    def work(comm):
        compression = Compression(**SPARSE, clip_norm=1.0, clip_scope=clip_scope)
        weight, optimizer = wrap(comm, sgd, compression=compression)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((weight + 1).sum()).backward()
        with pytest.raises(
            RuntimeError, match="give it to the DistributedOptimizer as grad_scaler"
        ):
            scaler.step(optimizer)
        assert (weight == 0).all()

    run_local(1, work)


def test_unscaling_by_hand_is_refused():
    """It divided what global clipping had kept a second time."""

    def work(comm):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        compression = Compression(**SPARSE, clip_norm=1.0)
        weight, optimizer = wrap(comm, sgd, compression=compression, grad_scaler=scaler)
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="leave it out, and clip with"):
            scaler.step(optimizer)

    run_local(1, work)


def test_decay_that_would_reach_only_what_arrives_is_refused():
    def work(comm):
        for make in (
            lambda p: Adam(p, betas=NO_FIRST, weight_decay=0.1),
            lambda p: SketchAdagrad(p, weight_decay=0.1),
        ):
            after = Compression(**SPARSE, preconditioning="after")
            with pytest.raises(ValueError, match="set decoupled_weight_decay=True"):
                wrap(comm, make, compression=after)
        weight, optimizer = wrap(comm, factored)
        optimizer.param_groups[0]["weight_decay"] = 0.1
        with pytest.raises(ValueError, match="set decoupled_weight_decay=True"):
            give(optimizer, weight, torch.ones(N, M))

    run_local(1, work)


@pytest.mark.parametrize("make", [
    lambda p: SketchMomentum(p, lr=0.1, momentum=0.9, min_compressed_numel=10**9),
    lambda p: FactoredAdam(p, lr=0.1, betas=(0.9, 0.999), min_compressed_numel=0),
])  # fmt: skip
def test_a_first_moment_moves_parameters_where_nothing_arrives_too(make):
    """A lone arrival was paid a tenth of itself; the rest waited for that entry's next."""

    def work(comm):
        weight, optimizer = wrap(comm, make)
        grad = torch.zeros(N, M)
        grad[3, 4] = 1.0
        places = []
        for _ in range(3):
            give(optimizer, weight, grad)
            places.append(weight[3, 4].item())
            grad = torch.zeros(N, M)
        return places

    first, second, third = run_local(1, work)[0]
    assert 0 > first > second > third


def test_gradients_kept_as_zeros_do_not_act_again():
    """A tensor that becomes sparse left its old p.grad to the rank that had no new one."""

    def work(comm):
        weight, optimizer = wrap(comm, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
        optimizer.set_density(1.0)
        weight.backward(torch.ones(N, M))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.set_density(0.01)
        if comm.rank == 0:
            weight.backward(torch.ones(N, M))
        optimizer.step()
        return weight.detach()

    one, other = run_local(2, work)
    assert torch.equal(one, other)


def test_options_reach_the_workers_statistics_also_after_a_load():
    def work(comm, loads):
        weight, optimizer = wrap(comm, factored)
        if loads:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["eps"] = 0.5
        give(optimizer, weight, torch.ones(N, M))
        return weight.detach()

    assert torch.equal(*(run_local(1, lambda c, x=x: work(c, x))[0] for x in (False, True)))
    assert_close(run_local(1, lambda c: work(c, True))[0].min(), torch.tensor(-0.1 / 1.5))


def test_a_workers_sketch_is_cleaned():
    def work(comm, **settings):
        weight, optimizer = wrap(
            comm, lambda p: SketchAdagrad(p, min_compressed_numel=0, **settings)
        )
        for _ in range(3):
            give(optimizer, weight, torch.ones(N, M))
        (name,) = optimizer._exchange.kept.statistics.preconditioners["w"].shared_names
        return optimizer.worker_state_dict()["statistics"]["w"][name]

    never = run_local(1, lambda comm: work(comm))[0]
    cleaned = run_local(1, lambda comm: work(comm, clean_interval=2, clean_factor=0.0))[0]
    assert_close(cleaned * 3, never)


@pytest.mark.parametrize("make", [sgd, factored])
def test_it_can_be_closed_and_made_anew(make):
    def work(comm):
        weight, optimizer = wrap(comm, make)
        give(optimizer, weight, torch.ones(N, M))
        optimizer.close()
        again = DistributedOptimizer(
            optimizer.inner, [("w", weight)], comm=comm, compression=Compression(**SPARSE)
        )
        before = weight.detach().clone()
        give(again, weight, torch.ones(N, M))
        return (weight != before).sum().item()

    assert run_local(1, work)[0] >= 12


def test_float64_parameters_train():
    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M, dtype=torch.float64))
        _, optimizer = wrap(comm, sgd, weight)
        give(optimizer, weight, torch.ones(N, M, dtype=torch.float64))
        return weight.detach()

    (weight,) = run_local(1, work)
    assert weight.dtype == torch.float64
    assert weight.min() == pytest.approx(-0.1)


def test_global_clipping_gives_gradients_up_one_by_one():
    def work(comm):
        model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(4)))
        optimizer = DistributedOptimizer(
            sgd(model.parameters()), model.named_parameters(), comm=comm,
            compression=Compression(**SPARSE, clip_norm=1.0),
        )  # fmt: skip
        model(torch.ones(2, 40)).sum().backward()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        alive = []
        add = optimizer._exchange.add

        def counting(*arguments):
            gc.collect()
            alive.append(sum(grad() is not None for grad in grads))
            add(*arguments)

        optimizer._exchange.add = counting
        optimizer.step()
        return alive

    assert max(run_local(1, work)[0][1:]) < 4
    assert run_local(1, work)[0][-1] <= 1


@pytest.mark.parametrize("value", [1e25, 2.0**41])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_too_large_to_work_with_is_no_silent_zero(value, clip_norm):
    """Its norm is infinite in float32: the clipped gradient was 0, and nothing said so."""
    compression = Compression(**SPARSE, clip_norm=clip_norm, clip_scope="tensor")

    def work(comm):
        weight, optimizer = wrap(comm, sgd, compression=compression)
        give(optimizer, weight, torch.full((N, M), value))
        return bool(optimizer.stats.skipped), bool((weight != 0).any())

    is_skipped, is_moved = run_local(1, work)[0]
    assert is_skipped != is_moved
    if value == 1e25:
        assert is_skipped


@pytest.mark.parametrize("value_dtype", ["float32", "mxfp8"])
def test_entries_whose_square_underflows_wait(value_dtype):
    """With eps = 0 they were divided by 0, sent as 0 and taken out of the residual."""

    def work(comm):
        compression = Compression(**SPARSE, value_dtype=value_dtype)
        weight, optimizer = wrap(
            comm, lambda p: Adam(p, lr=0.1, betas=NO_FIRST, eps=0.0), compression=compression
        )
        give(optimizer, weight, torch.full((N, M), 1e-25))
        return optimizer.compensation.residual["w"], weight.detach()

    residual, weight = run_local(1, work)[0]
    assert (residual == 1e-25).all()
    assert (weight == 0).all()


def test_a_worker_state_that_does_not_fit_changes_nothing():
    def work(comm):
        weight, optimizer = wrap(comm, factored)
        give(optimizer, weight, torch.ones(N, M))
        state = optimizer.worker_state_dict()
        saved = {
            **state,
            "statistics": {"w": {k: t * 2 for k, t in state["statistics"]["w"].items()}},
        }
        before = state["statistics"]["w"]["exp_avg_sq_row"].clone()
        for wrong, complaint in (
            (
                {"residual": {"w": torch.zeros(N, M).to(torch.bfloat16).view(-1)}},
                "saved as bfloat16",
            ),
            ({"residual": {"w": torch.zeros(5)}}, "with 5 elements"),
            ({"residual": {"x": torch.zeros(5)}}, "no parameter here"),
            ({"velocity": {"w": torch.zeros(N * M)}}, "no momentum here"),
        ):
            bad = {**saved, "compensation": {**state["compensation"], **wrong}}
            with pytest.raises(ValueError, match=complaint):
                optimizer.load_worker_state_dict(bad)
        now = optimizer.worker_state_dict()["statistics"]["w"]["exp_avg_sq_row"]
        assert torch.equal(now, before)

    run_local(1, work)
