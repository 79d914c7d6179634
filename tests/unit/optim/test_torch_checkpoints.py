"""Checkpoints between torch's optimizers and ours, and of options that change in mid-run."""

import copy
import io
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

import optim
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.tolerances import assert_close
from tests.unit.optim.helpers import (
    EVERY_OPTIMIZER,
    assert_same_state,
    copy_of_state,
    gradients,
    parameter,
    step,
)

SHAPES = [(12, 5), (3, 2, 4), (7,)]
PAIRS = {
    "Adam": (torch.optim.Adam, optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam, fused": (torch.optim.Adam, optim.Adam, {"fused": True}),
    "AdamW": (torch.optim.AdamW, optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW, foreach": (torch.optim.AdamW, optim.Adam, {"foreach": True, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, optim.RMSprop, {}),
    "RMSprop, momentum": (torch.optim.RMSprop, optim.RMSprop, {"momentum": 0.9, "alpha": 0.9}),
    "Adagrad": (torch.optim.Adagrad, optim.Adagrad, {"eps": 1e-6}),
    "Adagrad, from 0.1": (torch.optim.Adagrad, optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "SGD": (torch.optim.SGD, optim.Momentum, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD, no momentum": (torch.optim.SGD, optim.Momentum, {"lr": torch.tensor(0.01)}),
}


def parameters(dtype=torch.float32):
    return [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


def train(optimizer, params, turns):
    for turn in turns:
        for p in params:
            (p.grad,) = gradients(1, *p.shape, dtype=p.dtype, seed=turn)
        optimizer.step()


def resume(make, source, params):
    """Return copies of the parameters, and an optimizer of them that has loaded the source."""
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make(others)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return optimizer, others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["to ours", "to torch's"])
@pytest.mark.parametrize("name", PAIRS)
def test_runs_go_on_alike_where_the_other_optimizer_takes_them_up(name, direction, dtype):
    """The options of the checkpoint hold, except what chooses an implementation."""
    theirs, ours, options = PAIRS[name]
    if direction == "to ours":
        source, sink = partial(theirs, **options), partial(ours, lr=0.5)
    else:
        neutral = ("fused", "foreach", "initial_accumulator_value")
        options = {k: v for k, v in options.items() if k not in neutral}
        extra = {"momentum": 0} if name == "SGD, no momentum" else {}
        extra |= {"decoupled_weight_decay": True} if theirs is torch.optim.AdamW else {}
        source, sink = partial(ours, **options, **extra), partial(theirs, lr=0.5)
    params = parameters(dtype)
    straight = source(params)
    train(straight, params, range(4))
    resumed, others = resume(sink, straight, params)
    train(straight, params, range(4, 8))
    train(resumed, others, range(4, 8))
    for p, q in zip(params, others, strict=True):
        assert_close(q.detach(), p.detach())
    for p, q in zip(params, others, strict=True):
        for key in straight.state[p].keys() & resumed.state[q].keys() - {"step"}:
            assert_close(resumed.state[q][key], straight.state[p][key])
    again, same = resume(source, resumed, others)  # and back
    train(resumed, others, range(8, 10))
    train(again, same, range(8, 10))
    for p, q in zip(others, same, strict=True):
        assert_close(q.detach(), p.detach())


REFUSED = {
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}, optim.Adam, "amsgrad is True; allowed: False"),
    "centered": (torch.optim.RMSprop, {"centered": True}, optim.RMSprop,
                 "in group 0 of the checkpoint centered is True; allowed: False"),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, optim.Momentum,
                 "nesterov is True; allowed: False"),
    "dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, optim.Momentum,
                  "dampening is 0.5; allowed: 0"),
    "lr_decay": (torch.optim.Adagrad, {"lr_decay": 0.5}, optim.Adagrad,
                 "lr_decay is 0.5; allowed: 0: let a scheduler do it"),
    "NAdam": (torch.optim.NAdam, {}, optim.Adam, "keeps mu_product for parameter 0, which is NAda"),
    "Adamax": (torch.optim.Adamax, {}, optim.Adam, "keeps exp_inf for .* which is Adamax's in tor"),
    "Adadelta": (torch.optim.Adadelta, {}, optim.RMSprop, "keeps acc_delta .* which is Adadelta's"),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}, optim.Adam, "keeps {'momentum_buffer'.*; allowed"),
    "SGD, to RMSprop": (torch.optim.SGD, {"momentum": 0.9}, optim.RMSprop, "'square_avg': .* here"),
    "Adam": (torch.optim.Adam, {}, optim.Momentum, "keeps {.*'exp_avg'.*; allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(name):
    theirs, options, ours, message = REFUSED[name]
    params, others = parameters(), parameters()
    source, sink = theirs(params, **options), ours(others, lr=0.25)
    train(source, params, range(2))
    train(sink, others, range(1))
    before = copy_of_state(sink)
    with pytest.raises(ValueError, match=message):
        sink.load_state_dict(source.state_dict())
    assert_same_state(copy_of_state(sink), before)
    assert sink.param_groups[0]["lr"] == 0.25


def test_a_first_moment_of_no_weight_is_not_taken_over():
    p = parameter(12, 5)
    source = torch.optim.Adam([p], lr=0.01, betas=(0.0, 0.9))
    train(source, [p], range(3))
    resumed, (q,) = resume(optim.Adam, source, [p])
    assert resumed.state[q].keys() == {"step", "exp_avg_sq"}
    for optimizer, x in ((source, p), (resumed, q)):
        train(optimizer, [x], range(3, 6))
    assert_close(q.detach(), p.detach())


def test_a_momentum_buffer_that_sparse_gradients_made_is_taken_over():
    p = parameter(12, 5)
    source = torch.optim.SGD([p], lr=0.01, momentum=0.9)
    for grad in gradients(3, 12, 5):
        step(source, p, (grad * (torch.arange(12)[:, None] % 2)).to_sparse(1))
    assert source.state[p]["momentum_buffer"].is_sparse
    resumed, (q,) = resume(optim.Momentum, source, [p])
    assert torch.equal(
        resumed.state[q]["momentum_buffer"], source.state[p]["momentum_buffer"].to_dense()
    )


def test_adagrad_s_older_name_of_its_sum_is_read():
    params = parameters()
    source = optim.SketchAdagrad(params, min_compressed_numel=0)
    train(source, params, range(2))
    saved = copy.deepcopy(source.state_dict())
    for state in saved["state"].values():
        for key in list(state):
            state[key.replace("sum", "square_sum")] = state.pop(key)
    sink = optim.SketchAdagrad(parameters(), min_compressed_numel=0)
    sink.load_state_dict(saved)
    assert_same_state(copy_of_state(sink), copy_of_state(source))


# ---- from full moments to compressed ones ------------------------------------------------------


def loaded(make, delegated=False):
    """Return a parameter of an optimizer that took up dense Adam, and Adam's moments in full."""
    p, q = parameter(40, 3, 4), parameter(40, 3, 4)
    dense = torch.optim.Adam([p], lr=0.01)
    for grad in gradients(6, 40, 3, 4):
        step(dense, p, grad)
    optimizer = make([q], min_compressed_numel=0, lr=0.5)
    given = optimizer.delegate_second_moment(q) if delegated else None
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    state = given.tensors if delegated else optimizer.state[q]
    assert state["step"] == optimizer.state[q]["step"] == 6
    return optimizer, q, dense.state[p]


@pytest.mark.parametrize("delegated", [False, True])
def test_dense_adam_goes_on_with_the_factored_means_that_it_would_have_had(delegated):
    optimizer, q, _ = loaded(optim.FactoredAdam, delegated)
    r = parameter(40, 3, 4)
    straight = optim.FactoredAdam([r], lr=0.01, min_compressed_numel=0)
    given = straight.delegate_second_moment(r) if delegated else None
    for grad in gradients(6, 40, 3, 4):
        if delegated:
            given.observe(grad.view(-1), scale=None, num_parts=1, is_first=True)
        step(straight, r, grad)
    found, expected = (
        {**o.state[x], **(o._delegated[x].tensors if delegated else {})}
        for o, x in ((optimizer, q), (straight, r))
    )
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name], expected[name])
    train(optimizer, [q], range(2))


def test_dense_adam_goes_on_with_a_cover_and_sketches_that_bound_and_hold_its_moments():
    optimizer, q, full = loaded(optim.SM3Adam)
    assert_close(optimizer.state[q]["exp_avg"], full["exp_avg"])
    second = full["exp_avg_sq"]
    assert (optimizer.estimate(q) >= second).all()
    assert torch.equal(optimizer.state[q]["accumulator_1"], second.amax((0, 2), keepdim=True))

    optimizer, q, full = loaded(optim.SketchAdam)
    assert (optimizer.estimate(q) >= full["exp_avg_sq"] * (1 - 1e-6)).all()
    state = optimizer.state[q]
    sketch = optim.CountSketch.wrap(state["exp_avg"], state["exp_avg_seeds"])
    expected = torch.zeros_like(sketch.values).flatten(0, 1)
    buckets, signs = hash_rows(sketch.table, torch.arange(40))
    rows = full["exp_avg"].view(1, 40, 12) * signs[:, :, None]
    expected.index_add_(0, buckets.reshape(-1), rows.reshape(-1, 12))
    assert_close(sketch.values.flatten(0, 1), expected)
    train(optimizer, [q], range(2))


def test_torch_s_momentum_goes_into_a_sketch_and_its_sums_into_one():
    for theirs, ours, options in (
        (torch.optim.SGD, optim.SketchMomentum, {"momentum": 0.9}),
        (torch.optim.Adagrad, optim.SketchAdagrad, {}),
    ):
        p, q = parameter(40, 12), parameter(40, 12)
        source, sink = theirs([p], lr=0.01, **options), ours([q], min_compressed_numel=0)
        train(source, [p], range(3))
        sink.load_state_dict(source.state_dict())
        straight = ours([parameter(40, 12)], lr=0.01, min_compressed_numel=0, **options)
        train(straight, straight.param_groups[0]["params"], range(3))
        ((found, expected),) = zip(copy_of_state(sink), copy_of_state(straight), strict=True)
        assert found.keys() == expected.keys()
        for name in found.keys() - {"step"}:
            if name.endswith("_seeds"):
                assert torch.equal(found[name], expected[name])
            else:
                assert_close(found[name], expected[name])


def test_compressed_moments_are_not_made_full():
    p, q = parameter(40, 12), parameter(40, 12)
    source = optim.FactoredAdam([p], min_compressed_numel=0)
    with pytest.raises(ValueError, match=r"keeps .*exp_avg_sq_row.*; allowed: .*'exp_avg_sq': \("):
        optim.Adam([q]).load_state_dict(source.state_dict())
    full = optim.Adam([q])
    train(full, [q], range(2))
    source.load_state_dict(full.state_dict())  # ours in full, too: the structure here stays
    assert source.param_groups[0]["second_moment"] == "factored"
    assert "exp_avg_sq_row" in source.state[p] and "exp_avg_sq" not in source.state[p]


# ---- options that change in mid-run ------------------------------------------------------------

CYCLED = [name for name in EVERY_OPTIMIZER if "dagrad" not in name]


def set_momentum(optimizer, value):
    group = optimizer.param_groups[0]
    if "betas" in group:
        group["betas"] = (value, group["betas"][1])
    else:
        group["momentum"] = value


@pytest.mark.parametrize("saved_after", [3, 4, 5, 6])
@pytest.mark.parametrize("name", CYCLED)
def test_momentum_that_comes_and_goes_is_resumed_as_if_never_stopped(name, saved_after):
    """From above 0 to 0 and back; the checkpoint's options count, whatever the optimizer's are."""
    momenta = [0.9, 0.9, 0.0, 0.0, 0.8, 0.8, 0.0, 0.9]

    def run(optimizer, params, turns):
        for turn in turns:
            train(optimizer, params, [turn])
            set_momentum(optimizer, momenta[turn])  # as a scheduler does, after the step

    params = parameters()
    straight = EVERY_OPTIMIZER[name](params)
    run(straight, params, range(saved_after))
    for other in (0.0, 0.5):

        def make(others, other=other):
            optimizer = EVERY_OPTIMIZER[name](others)
            set_momentum(optimizer, other)
            train(optimizer, others, [0])  # so that it has its own state
            return optimizer

        resumed, others = resume(make, straight, params)
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
        on, copies = copy.deepcopy((straight, params))
        run(on, copies, range(saved_after, 8))
        run(resumed, others, range(saved_after, 8))
        assert all(map(torch.equal, copies, others))
        assert_same_state(copy_of_state(resumed), copy_of_state(on))


@pytest.mark.parametrize("name", CYCLED)
def test_a_first_moment_is_there_while_its_weight_is_above_0(name):
    p = parameter(12, 5)
    optimizer = EVERY_OPTIMIZER[name]([p])
    for weight in (0.0, 0.9, 0.0, 0.9):
        set_momentum(optimizer, weight)
        before = p.detach().clone()
        for grad in gradients(3, 12, 5):
            step(optimizer, p, grad)
        kept = {key for key in optimizer.state[p] if key in ("exp_avg", "momentum_buffer")}
        assert bool(kept) == bool(weight)
        assert p.isfinite().all() and not torch.equal(p, before)


def test_a_first_moment_that_begins_among_steps_delays_and_adds_nothing():
    """Of a gradient of 1, 0.1 moves at once, 0.09 in the next step; in the end all of it."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = optim.Adam([p], lr=1.0, betas=(0.0, 0.5))
    for _ in range(200):
        step(optimizer, p, torch.ones(3))
    set_momentum(optimizer, 0.9)
    p.data.zero_()
    moved = []
    for _ in range(3):
        before = p.detach().clone()
        step(optimizer, p, torch.ones(3))
        moved.append(before - p.detach())
    assert_close(torch.stack(moved)[:, 0], torch.tensor([0.1, 0.19, 0.271]))


@pytest.mark.parametrize("name", ["Adam", "FactoredAdam"])
def test_a_cycled_momentum_is_resumed_where_the_second_moment_is_delegated(name):
    def delegated():
        p = parameter(12, 5)
        optimizer = EVERY_OPTIMIZER[name]([p])
        optimizer.delegate_second_moment(p)
        return optimizer, p

    def run(optimizer, p, turns):
        for turn in turns:
            set_momentum(optimizer, [0.0, 0.9, 0.0, 0.9][turn % 4])
            train(optimizer, [p], [turn])

    for turns in range(1, 5):
        (straight, p), (resumed, q) = delegated(), delegated()
        run(straight, p, range(turns))
        run(resumed, q, range(1, 4))
        set_momentum(straight, 0.9)
        resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
        q.data.copy_(p.data)
        for each, x in ((straight, p), (resumed, q)):
            run(each, x, range(turns, 6))
        assert torch.equal(p, q)
        assert_same_state(copy_of_state(straight), copy_of_state(resumed))


@pytest.mark.parametrize(
    "pair", [(torch.optim.Adam, optim.Adam), (torch.optim.SGD, optim.Momentum)]
)
def test_one_cycle_takes_momentum_to_0_and_back_as_in_torch(pair):
    """In the one step at 0 ours forgets its first moment; torch has that one gradient in it."""
    moved = []
    for make in pair:
        p = parameter(12, 5)
        optimizer = make([p], lr=0.1)
        schedule = OneCycleLR(optimizer, max_lr=0.01, total_steps=20, base_momentum=0.0,
                              max_momentum=0.9)  # fmt: skip
        momenta = []
        for grad in gradients(20, 12, 5):
            step(optimizer, p, grad)
            schedule.step()
            group = optimizer.param_groups[0]
            momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        assert 0.0 in momenta
        moved.append(p.detach() - parameter(12, 5).detach())
    assert (moved[0] - moved[1]).abs().max() < 0.005 * moved[0].abs().max()


def test_how_moments_are_kept_does_not_change_between_steps():
    changes = [("second_moment", "sketch"), ("second_moment", "factored"),
               ("min_compressed_numel", 10**6), ("first_moment", "sketch")]  # fmt: skip
    for name, value in changes:
        p = parameter(12, 5)
        kind = optim.FactoredAdam if name == "min_compressed_numel" else optim.Adam
        optimizer = kind([p], min_compressed_numel=0)
        train(optimizer, [p], range(2))
        before, state = p.detach().clone(), copy_of_state(optimizer)
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match="after 2 steps, and its options now ask for .*cannot"):
            train(optimizer, [p], range(1))
        assert torch.equal(p, before)
        assert_same_state(copy_of_state(optimizer), state)
