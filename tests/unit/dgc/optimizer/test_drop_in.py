"""What code written for torch's optimizers does with one: hooks, copies, gradients that are
dropped, frozen or read, steps that are given up."""

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from optim import FactoredAdam, SketchAdam
from tests.unit.dgc.method import NO_FIRST, assert_equal

SPARSE = {"density": 0.05, "min_numel": 1, "exact_below": 64}
WAYS = {
    "dense": None,
    "gather": Compression(**SPARSE, protocol="gather"),
    "sparse all-reduce": Compression(**SPARSE, protocol="sparse_all_reduce"),
    "two levels": Compression(**SPARSE, protocol="gather", two_level=True, ranks_per_island=2),
}
ADAM = {"lr": 0.01, "betas": NO_FIRST, "min_compressed_numel": 0}
INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "FactoredAdam": lambda p: FactoredAdam(p, **ADAM),
}


class Shuffled(nn.Module):
    """Layers are registered in another order than they run in."""

    def __init__(self):
        super().__init__()
        for number in (2, 0, 1):
            self.add_module(f"layer{number}", nn.Linear(12, 12, bias=False))

    def forward(self, x):
        return self.layer2(self.layer1(self.layer0(x)))


with torch.random.fork_rng():  # here, since workers are threads that share the random state
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2))
    SHUFFLED, TABLE = Shuffled(), nn.Embedding(30, 12, sparse=True)


def make_model():
    return copy.deepcopy(MODEL)


def wrap(comm, model, compression=None, make=INNER["SGD"], **settings):
    inner = make(model.parameters())
    return DistributedOptimizer(
        inner, model.named_parameters(), comm=comm, compression=compression, bucket_bytes=1,
        **settings,
    )  # fmt: skip


def loss_of(model, generator):
    return model(torch.randn(6, 12, generator=generator)).square().sum()


def train(model, optimizer, generator, num_steps=1):
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, generator).backward()
        optimizer.step()


def everything(model, optimizer):
    states = model.state_dict(), optimizer.inner.state_dict(), optimizer.worker_state_dict()
    return copy.deepcopy(states)


# ---- hooks and copies ----------------------------------------------------------------------------


def test_hooks_run_as_torchs_do_and_may_change_what_they_are_given():
    def work(comm):
        model, seen = make_model(), []
        optimizer = wrap(comm, model)
        optimizer.register_step_pre_hook(lambda o, *given: seen.append(("pre", o is optimizer)))
        optimizer.register_step_pre_hook(lambda o, *given: ((o, lambda: 3.0), {}))
        optimizer.register_step_post_hook(lambda o, args, kw: seen.append(("post", args[1]())))
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
        taken = []

        def strip(o, state):
            taken.append(state.pop("more"))
            return {**state, "param_groups": [{**g, "lr": 0.5} for g in state["param_groups"]]}

        optimizer.register_load_state_dict_pre_hook(strip)
        tell = optimizer.register_load_state_dict_post_hook
        tell(lambda o: taken.append(o.param_groups[0]["lr"]))
        assert optimizer.step() == 3.0
        optimizer.load_state_dict(optimizer.state_dict())
        return seen, taken

    assert run_local(1, work) == [([("pre", True), ("post", 3.0)], [1, 0.5])]


def test_it_cannot_be_copied_and_trying_breaks_nothing():
    def work(comm):
        model = make_model()
        optimizer = wrap(comm, model)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        for attempt in (
            lambda: copy.deepcopy(optimizer), lambda: copy.copy(optimizer),
            lambda: copy.deepcopy(scheduler), lambda: pickle.dumps(optimizer),
        ):  # fmt: skip
            with pytest.raises(TypeError, match=r"cannot be copied or pickled.*worker_state_dict"):
                attempt()
        train(model, optimizer, torch.Generator())
        other = make_model()
        train(other, wrap(comm, other), torch.Generator())

    run_local(1, work)


@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_cycles_of_the_momentum_reach_the_correction_or_are_refused_by_name(cycle_momentum):
    def work(comm, compression):
        model = make_model()
        optimizer = wrap(comm, model, compression)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=9, cycle_momentum=cycle_momentum
        )
        momenta = []
        for _ in range(4):
            train(model, optimizer, torch.Generator())
            momenta.append(optimizer.compensation.momentum)
            scheduler.step()
        return momenta

    (momenta,) = run_local(1, lambda comm: work(comm, WAYS["gather"]))
    assert (len(set(momenta)) > 2) == cycle_momentum

    def own(comm):
        model = make_model()
        settings = Compression(**SPARSE, momentum=0.9)
        optimizer = wrap(comm, model, settings, lambda p: torch.optim.SGD(p, lr=0.1))
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=9, cycle_momentum=cycle_momentum
        )
        train(model, optimizer, torch.Generator())

    if cycle_momentum:
        with pytest.raises(ValueError, match="cycle_momentum=False"):
            run_local(1, own)
    else:
        run_local(1, own)


# ---- what is dropped -----------------------------------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
@pytest.mark.parametrize("compression", WAYS.values(), ids=WAYS)
def test_modules_zero_grad_drops_micro_batches_without_a_trace(compression, make, set_to_none):
    """A GAN's loop relies on it: another loss's gradients are dropped before the own backward."""
    if compression is not None and make is INNER["Adam"]:
        make = INNER["FactoredAdam"]

    def work(comm, has_stray):
        model, generator = make_model(), torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, compression, make, micro_batches_per_step=2)
        for _ in range(3):
            if has_stray:
                (loss_of(model, torch.Generator().manual_seed(99)) * 1e3).backward()
                model.zero_grad(set_to_none)
            loss_of(model, generator).backward()
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, optimizer)

    strays, none = (run_local(4, lambda c, h=h: work(c, h), 2) for h in (True, False))
    assert_equal(strays, none)


@pytest.mark.parametrize("compression", [None, WAYS["gather"]], ids=["dense", "gather"])
@pytest.mark.parametrize("how", ["all dropped", "abandoned", "one rank fails", "update dropped"])
def test_a_step_is_given_up_on_all_ranks_to_the_bit(compression, how):
    def work(comm, how):
        model, generator = make_model(), torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, compression)
        train(model, optimizer, generator, 2)
        before = everything(model, optimizer)
        other = torch.Generator().manual_seed(7)
        loss = loss_of(model, other)
        if how == "one rank fails" and comm.rank == 1:
            handle = model[0].weight.register_hook(_fail)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            handle.remove()
            optimizer.abandon_step()
        elif how == "update dropped":
            loss.backward()
            optimizer.synchronize()
            with pytest.raises(RuntimeError, match="the other ranks may have stepped"):
                optimizer.abandon_step()
            optimizer.zero_grad()
        elif how:
            loss.backward()
            if how == "all dropped":
                model.zero_grad()
            optimizer.abandon_step() if how == "abandoned" else optimizer.step()
            assert optimizer.stats.skipped
        assert_equal(everything(model, optimizer), before)
        train(model, optimizer, generator, 2)
        return everything(model, optimizer)

    given_up, undisturbed = (run_local(2, lambda c, h=h: work(c, h)) for h in (how, ""))
    assert_equal(given_up, undisturbed)


def _fail(grad):
    raise ZeroDivisionError


def test_what_has_left_cannot_be_dropped_alone():
    def work(comm):
        model = make_model()
        optimizer = wrap(comm, model)
        loss_of(model, torch.Generator()).backward()
        model[2].zero_grad()  # its buckets were the first to leave
        with pytest.raises(RuntimeError, match=r"of 2\.\w+ after backward\(\), when it had left"):
            optimizer.step()

    run_local(1, work)


# ---- what is frozen ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
@pytest.mark.parametrize("compression", WAYS.values(), ids=WAYS)
def test_a_layer_frozen_on_all_ranks_stops_and_goes_on_where_it_was(compression, make):
    if compression is not None and make is INNER["Adam"]:
        compression = Compression(**SPARSE, preconditioning="after")

    def work(comm):
        model, generator = make_model(), torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, compression, make)
        train(model, optimizer, generator, 2)
        frozen = everything(model[1], optimizer)
        model[1].requires_grad_(False)
        train(model, optimizer, generator, 2)
        for before, now in zip(frozen, everything(model[1], optimizer), strict=True):
            for kind, name in (("residual", "1.weight"), ("velocity", "1.weight")):
                if "compensation" in before:
                    kept = before["compensation"][kind], now["compensation"][kind]
                    assert_equal(*(part.get(name) for part in kept))
        assert_equal(frozen[0], model[1].state_dict())
        model[1].requires_grad_(True)
        train(model, optimizer, generator, 1)
        assert not torch.equal(frozen[0]["weight"], model[1].weight)
        model[1].requires_grad_(comm.rank > 0)  # on one rank alone it counts as zero
        train(model, optimizer, generator, 2)
        return copy.deepcopy(model.state_dict())

    one, *others = run_local(4, work, 2)
    for other in others:
        assert_equal(other, one)


def test_a_frozen_table_of_rows_stops():
    def work(comm):
        table = nn.Embedding(10, 4, sparse=True)
        optimizer = wrap(comm, table, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = table.weight.detach().clone()
        table.requires_grad_(False)
        optimizer.step()
        assert torch.equal(before, table.weight)

    run_local(2, work)


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reads",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda model: [p.grad.norm() for p in model.parameters()],
        lambda model: [p.grad.data.add_(1) for p in model.parameters()],
        lambda model: sum(p.grad.detach().sum() for p in model.parameters()),
    ],
)
def test_a_gradient_that_is_gone_cannot_be_read_or_changed_in_silence(reads):
    def work(comm):
        model = make_model()
        optimizer = wrap(comm, model)
        loss_of(model, torch.Generator()).backward()
        with pytest.raises(RuntimeError, match=r"clip_grad_norm_.*stats\.gradient_norm"):
            reads(model)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
        assert all(type(p.grad) is torch.Tensor for p in model.parameters())

    run_local(1, work)


def test_clipping_on_the_wrapper_is_that_of_the_mean_or_says_why_it_cannot_be():
    def work(comm, compression, max_norm=0.5):
        model, generator = make_model(), torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, compression, lambda p: torch.optim.SGD(p, lr=1.0))
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        loss_of(model, generator).backward()
        norm = optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        return norm.item(), step.norm().item()

    for norm, length in run_local(2, lambda comm: work(comm, None)):
        assert norm > 1
        assert math.isclose(length, 0.5, rel_tol=1e-4)
    for norm, length in run_local(2, lambda comm: work(comm, None, max_norm=100.0)):
        assert norm < 100 and math.isclose(length, norm, rel_tol=1e-4)
    kept = Compression(density=1.0, clip_norm=math.inf, clip_scope="global")
    for norm, length in run_local(2, lambda comm: work(comm, kept)):
        assert norm > 1
        assert 0.2 < length < 0.5001  # the mean of two, each of length 0.5
    with pytest.raises(RuntimeError, match=r"Compression\(clip_norm=0.5\)"):
        run_local(1, lambda comm: work(comm, WAYS["gather"]))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_stats_tell_norms_and_the_factor_of_clipping(scope):
    def work(comm):
        model, generator = make_model(), torch.Generator().manual_seed(0)
        clip = {"clip_norm": 1e-3, "clip_scope": scope}
        optimizer = wrap(comm, model, Compression(**SPARSE, **clip), INNER["FactoredAdam"])
        train(model, optimizer, generator)
        reference = make_model()
        loss_of(reference, torch.Generator().manual_seed(0)).backward()
        norms = [p.grad.norm() for p in reference.parameters()]
        total = torch.stack(norms).norm().item()
        assert math.isclose(optimizer.stats.gradient_norm, total, rel_tol=1e-5)
        worst = max(norms).item() * math.sqrt(len(norms)) if scope == "tensor" else total
        assert math.isclose(optimizer.stats.clip_factor, 1e-3 / worst, rel_tol=1e-5)
        kept = optimizer.worker_state_dict()["compensation"]["residual"].values()
        residual = math.hypot(*(part.norm().item() for part in kept))
        assert math.isclose(optimizer.stats.residual_norm, residual, rel_tol=1e-5)
        assert residual > 0

    run_local(1, work)


# ---- order, rows, saving -------------------------------------------------------------------------


def test_buckets_follow_the_gradients_and_a_resumed_run_knows_their_order():

    def work(comm, is_resumed):
        model = copy.deepcopy(SHUFFLED)
        generator = torch.Generator().manual_seed(comm.rank)
        optimizer = wrap(comm, model, WAYS["gather"])
        train(model, optimizer, generator, 2)
        order = [spec.name for bucket in optimizer.buckets for spec in bucket.specs]
        assert order == [f"layer{number}.weight" for number in (2, 1, 0)]
        if is_resumed:
            state, worker = optimizer.state_dict(), copy.deepcopy(optimizer.worker_state_dict())
            optimizer.close()
            optimizer = wrap(comm, model, WAYS["gather"])
            optimizer.load_state_dict(state), optimizer.load_worker_state_dict(worker)
            assert optimizer.buckets[0].specs[0].name == "layer2.weight"
        num_left = []
        handle = model.layer0.weight.register_hook(
            lambda _: num_left.append(optimizer._exchange.num_started)
        )
        train(model, optimizer, generator, 2)
        handle.remove()
        assert num_left == [2, 2]  # all but the one whose gradient is coming
        return everything(model, optimizer)

    resumed, undisturbed = (run_local(2, lambda c, r=r: work(c, r)) for r in (True, False))
    assert_equal(resumed, undisturbed)


def test_ranks_whose_gradients_come_in_different_orders_send_the_same_buckets():
    def work(comm):
        model = copy.deepcopy(SHUFFLED)
        optimizer = wrap(comm, model, WAYS["gather"])
        for _ in range(2):
            for layer in list(model.children())[:: 1 if comm.rank == 0 else -1]:
                layer(torch.ones(1, 12)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        order = [spec.name for bucket in optimizer.buckets for spec in bucket.specs]
        return order, list(model.parameters())

    one, other = run_local(2, work)
    assert one[0] == other[0] == [f"layer{number}.weight" for number in (2, 0, 1)]
    assert_equal(one[1], other[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: SketchAdam(p, lr=0.01, betas=NO_FIRST, min_compressed_numel=0),
    ],
    ids=["SGD", "SketchAdam"],
)
@pytest.mark.parametrize("compression", WAYS.values(), ids=WAYS)
def test_rows_that_nobody_named_are_found_in_the_first_step(compression, make):
    """One rank never has a gradient of the table; the table shares a bucket with a layer."""

    def work(comm, names):
        model = nn.Sequential(copy.deepcopy(TABLE), *make_model())
        optimizer = DistributedOptimizer(
            make(model.parameters()), model.named_parameters(), comm=comm,
            compression=compression, row_sparse=names,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(4):
            words = torch.randint(30, (5,), generator=generator)
            optimizer.zero_grad()
            (model[1:](torch.randn(5, 12, generator=generator)) if comm.rank == 1 else
             model(words)).square().sum().backward()  # fmt: skip
            optimizer.step()
        assert optimizer.stats.row_bytes > 0
        assert ("0.weight" in optimizer.worker_state_dict()["statistics"]) is False
        return copy.deepcopy(model.state_dict())

    found, named = (run_local(4, lambda c, n=n: work(c, n), 2) for n in ((), ["0.weight"]))
    for other in found[1:]:
        assert_equal(other, found[0])
    for name, value in named[0].items():
        if "sparse" not in str(compression):  # owners are dealt by place in the bucket
            torch.testing.assert_close(found[0][name], value)


def test_saving_half_of_the_state_is_told_once(caplog):
    def work(comm):
        model = make_model()
        optimizer = wrap(comm, model, WAYS["gather"])
        generator = torch.Generator()
        optimizer.state_dict()  # there is nothing to lose yet
        train(model, optimizer, generator)
        optimizer.state_dict(), optimizer.worker_state_dict()
        train(model, optimizer, generator)
        assert not caplog.records
        for _ in range(2):
            optimizer.state_dict()
            train(model, optimizer, generator)

    with caplog.at_level(logging.WARNING):
        run_local(1, work)
    assert [record.getMessage()[:12] for record in caplog.records] == ["state_dict()"]


def test_horovods_arguments_pass_where_they_mean_the_same_and_say_what_to_do_elsewhere():
    def work(comm):
        model = make_model()
        wrapped = wrap(comm, model, backward_passes_per_step=2, num_groups=0, groups=None,
                       sparse_as_dense=False, gradient_predivide_factor=1.0)  # fmt: skip
        assert wrapped.backward_passes_per_step == wrapped.micro_batches_per_step == 2
        wrapped.set_backward_passes_per_step(1)
        train(model, wrapped, torch.Generator())
        wrapped.close()
        for given, error, words in (
            ({"groups": 2}, ValueError, "bucket_bytes"),
            ({"sparse_as_dense": True}, ValueError, "sparse=False"),
            ({"gradient_predivide_factor": 2.0}, ValueError, "leave it out"),
            ({"op": "sum"}, ValueError, "multiply lr"),
            ({"process_set": 1}, ValueError, "job of its own"),
            ({"backward_passes_per_step": 0}, ValueError, "1 or more"),
            ({"backward_passes_per_step": 2, "micro_batches_per_step": 3}, ValueError, "one of th"),
            ({"fp16": True}, TypeError, "unexpected argument 'fp16'"),
        ):
            with pytest.raises(error, match=words):
                wrap(comm, model, **given)
        with pytest.raises(TypeError, match=r"comm=: HorovodComm\(\)"):
            wrap(None, model)
        with pytest.raises(ValueError, match="named_parameters has a tensor"):
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            DistributedOptimizer(inner, model.parameters(), comm=comm)

    run_local(1, work)
