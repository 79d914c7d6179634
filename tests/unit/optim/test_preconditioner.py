import copy

import pytest
import torch
from torch import nn

from optim import SM3, Adam, FactoredAdam, SketchAdam, SketchMomentum, SM3Adam
from tests.tolerances import assert_close

SHAPES = [(40, 50), (16, 8, 3, 3), (70, 1)]
NO_FIRST = {"betas": (0.0, 0.999)}
KINDS = {
    "full": lambda p: Adam(p, **NO_FIRST),
    "factored": lambda p: FactoredAdam(p, **NO_FIRST, min_compressed_numel=0),
    "cover": lambda p: SM3Adam(p, **NO_FIRST, min_compressed_numel=0),
    "sums": lambda p: SM3(p),
    "sums, variant I": lambda p: SM3(p, variant="I"),
    "sketch": lambda p: SketchAdam(p, **NO_FIRST, min_compressed_numel=0),
    "too small": lambda p: FactoredAdam(p, **NO_FIRST, min_compressed_numel=10**6),
}


def gradients(shape, count=4):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def delegated(kind, shape):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = KINDS[kind]([p])
    return p, optimizer, optimizer.delegate_second_moment(p)


def feed(preconditioner, grad):
    preconditioner.observe(grad.reshape(-1), scale=None, num_parts=1, is_first=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fed_apart_it_is_the_moment_that_the_optimizer_would_have(kind, shape):
    _, _, apart = delegated(kind, shape)
    p = nn.Parameter(torch.zeros(shape))
    own = KINDS[kind]([p])
    for grad in gradients(shape):
        feed(apart, grad)
        p.grad = grad
        own.step()
    assert torch.equal(apart._moment.estimate(), own.estimate(p))
    assert int(apart.tensors["step"]) == 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_root_at_some_places_is_the_root_there(kind, shape):
    p, _, apart = delegated(kind, shape)
    for grad in gradients(shape):
        feed(apart, grad)
    indices = torch.randperm(p.numel(), generator=torch.Generator().manual_seed(0))[:37]
    assert torch.equal(apart.root(indices), apart.root()[indices])
    assert (apart.root() > 0).all()


def test_root_has_adams_bias_correction_and_eps():
    _, _, apart = delegated("full", (40, 50))
    for grad in (grads := gradients((40, 50), 3)):
        feed(apart, grad)
    nu = sum(0.999 ** (2 - t) * 0.001 * g.double() ** 2 for t, g in enumerate(grads))
    expected = (nu / (1 - 0.999**3)).sqrt() + 1e-8
    assert_close(apart.root().view(40, 50), expected.float())


@pytest.mark.parametrize("kind", ["full", "factored", "cover"])
def test_the_root_of_a_huge_gradient_is_as_large_and_one_that_is_not_finite_shows(kind):
    """Its square, times what corrects the bias, would overflow."""
    _, _, apart = delegated(kind, (40, 50))
    feed(apart, torch.full((40, 50), 1e20))
    assert_close(apart.root(), torch.full((2000,), 1e20))
    for bad in (float("nan"), float("inf")):
        _, _, apart = delegated(kind, (40, 50))
        grad = torch.ones(40, 50)
        grad[3, 7] = bad
        feed(apart, grad)
        root = apart.root().view(40, 50)
        assert not root[3, 7].isfinite()
        assert kind != "factored" or root.isnan().all()


@pytest.mark.parametrize("kind", ["full", "factored"])
def test_micro_batches_feed_the_mean_of_their_own_squares(kind):
    """Each part's gradient by itself is num_parts times what it adds to the sum."""
    _, _, parts = delegated(kind, (40, 50))
    _, _, whole = delegated("full", (40, 50))
    grads = gradients((40, 50), 4)
    for number, grad in enumerate(grads):
        parts.observe(grad.view(-1) / 4, scale=None, num_parts=4, is_first=number == 0)
    feed(whole, torch.stack(grads).square().mean(0).sqrt())
    assert int(parts.tensors["step"]) == 1
    if kind == "full":
        assert_close(parts.root(), whole.root())
    else:
        mine, theirs = (float(m._moment.estimate().mean()) for m in (parts, whole))
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_scale_multiplies_the_gradient():
    _, _, one = delegated("full", (40, 50))
    _, _, other = delegated("full", (40, 50))
    grad = gradients((40, 50))[0]
    one.observe(grad.view(-1), scale=torch.tensor([0.25]), num_parts=1, is_first=True)
    feed(other, grad * 0.25)
    assert torch.equal(one.root(), other.root())


def test_what_arrives_is_then_applied_as_it_is():
    p, optimizer, _ = delegated("factored", (40, 50))
    optimizer.param_groups[0]["lr"] = 0.5
    p.grad = torch.ones(40, 50)
    optimizer.step()
    assert (p == -0.5).all()
    p.grad = None
    indices = torch.tensor([3, 77, 1999])
    optimizer.step(elements={p: (indices, torch.tensor([1.0, 2.0, 3.0]))})
    assert p.view(-1)[indices].tolist() == [-1.0, -1.5, -2.0]
    assert (p.view(-1) == -0.5).sum() == 1997


def test_a_first_moment_then_averages_what_arrives():
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = FactoredAdam([p], lr=1.0, betas=(0.9, 0.999), min_compressed_numel=0)
    optimizer.delegate_second_moment(p)
    assert set(optimizer.state[p]) == {"step", "exp_avg"}
    for value in (1.0, 3.0):
        p.grad = torch.full((40, 50), value)
        optimizer.step()
    # m1 = .1 -> p -= 1; m2 = .09 + .3 -> p -= .39 / .19
    assert_close(p.data, torch.full((40, 50), -1 - 0.39 / 0.19))


def test_decoupled_decay_reaches_all_of_the_parameter():
    p = nn.Parameter(torch.ones(40, 50))
    optimizer = FactoredAdam([p], lr=0.1, **NO_FIRST, weight_decay=0.5, decoupled_weight_decay=True)
    optimizer.delegate_second_moment(p)
    optimizer.step(elements={p: (torch.tensor([7]), torch.tensor([1.0]))})
    assert_close(p.view(-1)[7], torch.tensor(0.95 - 0.1))
    assert_close(p.view(-1)[8:], torch.full((1992,), 0.95))
    nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    optimizer.step(elements={p: nothing})
    assert_close(p.view(-1)[8:], torch.full((1992,), 0.95**2))


def test_coupled_decay_is_refused():
    p = nn.Parameter(torch.ones(40, 50))
    with pytest.raises(ValueError, match="set decoupled_weight_decay=True"):
        FactoredAdam([p], weight_decay=0.1).delegate_second_moment(p)


MAKERS = {
    "factored": lambda p: FactoredAdam([p], min_compressed_numel=0, **NO_FIRST),
    "with a first moment": lambda p: FactoredAdam([p], min_compressed_numel=0),
    "sketch that is cleaned": lambda p: SketchAdam(
        [p], min_compressed_numel=0, clean_factor=0.5, clean_interval=2, **NO_FIRST
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("load_when", ["before", "after"])
def test_the_moment_of_a_plain_run_goes_on_where_it_is_delegated(make, load_when):
    """Stepped alone, then delegated, or loaded by one that has delegated: the same moment after."""

    def gradients():
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            yield torch.randn(40, 50, generator=generator)

    p = nn.Parameter(torch.zeros(40, 50))
    plain = make(p)
    q = nn.Parameter(torch.zeros(40, 50))
    delegating = make(q)
    if load_when == "after":
        given = delegating.delegate_second_moment(q)
    for number, gradient in enumerate(gradients()):
        if number == 4:
            delegating.load_state_dict(plain.state_dict())
            if load_when == "before":
                given = delegating.delegate_second_moment(q)
        p.grad = gradient
        plain.step()
        if number >= 4:
            given.observe(gradient.view(-1), scale=None, num_parts=1, is_first=True)
            delegating.step(elements={q: (torch.tensor([3]), torch.tensor([1.0]))})
    assert int(given.tensors["step"]) == int(delegating.state[q]["step"]) == 6
    # of the last step, the cleaning is still to come
    given.observe(torch.zeros(2000), scale=None, num_parts=1, is_first=True)
    p.grad = torch.zeros(40, 50)
    plain.step()
    expected = (plain.estimate(p) * plain._scalars(plain.param_groups[0], 7)["second_scale"]).sqrt()
    assert_close(given.root() - 1e-8, expected.view(-1))


def test_a_moment_that_is_taken_back_begins_anew_with_all_state():
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = FactoredAdam([p], lr=0.1, min_compressed_numel=0)
    fresh = copy.deepcopy(optimizer.state_dict())
    given = optimizer.delegate_second_moment(p)
    given.observe(torch.ones(2000), scale=None, num_parts=1, is_first=True)
    optimizer.step(elements={p: (torch.tensor([3]), torch.tensor([1.0]))})
    optimizer.reclaim_second_moment(p)
    optimizer.reclaim_second_moment(p)  # nothing is left to take back
    assert str(optimizer.state_dict()) == str(fresh)
    p.grad = torch.full((40, 50), 7.0)
    before = p.detach().clone()
    optimizer.step()
    assert_close(before - p.data, torch.full((40, 50), 0.1))  # a first step, not a far larger one


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_moment_that_nobody_fed_comes_back_as_it_was_given(num_steps):
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = FactoredAdam([p], min_compressed_numel=0)
    for _ in range(num_steps):
        p.grad = torch.randn(40, 50)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.delegate_second_moment(p)
    assert set(optimizer.state[p]) == {"step", "exp_avg"}
    optimizer.reclaim_second_moment(p)
    after = optimizer.state_dict()["state"][0]
    assert {k: str(v) for k, v in after.items()} == {
        k: str(v) for k, v in before["state"][0].items()
    }


def test_an_optimizer_without_a_second_moment_has_none_to_give():
    p = nn.Parameter(torch.ones(100, 50))
    assert SketchMomentum([p], momentum=0.9).delegate_second_moment(p) is None


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_copies_know_that_it_is_elsewhere(kind):
    p, optimizer, _ = delegated(kind, (40, 50))
    assert set(optimizer.state[p]) == {"step"}
    other, fresh, _ = delegated(kind, (40, 50))
    fresh.load_state_dict(optimizer.state_dict())
    assert set(fresh.state[other]) == {"step"}
    own = KINDS[kind]([nn.Parameter(torch.zeros(40, 50))])
    with pytest.raises(ValueError, match="Make the DistributedOptimizer first"):
        own.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy(optimizer)
    (q,) = copied.param_groups[0]["params"]
    q.grad = torch.ones(40, 50)
    copied.step()
    assert (q == -copied.param_groups[0]["lr"]).all()
