"""Uninitialized parameters of lazy modules: their state is made in the first step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import optim
from tests.unit.optim.helpers import EVERY_OPTIMIZER, assert_same_state

every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)
INPUT = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


def model_of(first, second):
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(4, 2))


def lazy_model(dtype=torch.float32):
    """A model of which two modules are lazy, and one is not."""
    lazy = model_of(nn.LazyLinear(8, dtype=dtype), nn.LazyLinear(4, dtype=dtype))
    return lazy.to(dtype)


def plain_model(like, dtype=torch.float32):
    model = model_of(nn.Linear(6, 8), nn.Linear(8, 4)).to(dtype)
    model.load_state_dict(like.state_dict())
    return model


def train(model, optimizer, num_steps=3):
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(INPUT.to(model[3].weight.dtype)).square().mean().backward()
        optimizer.step()


def states(model, optimizer):
    return [optimizer.state[p] for p in model.parameters()]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_a_model_that_was_never_lazy(name, dtype):
    model = lazy_model(dtype)
    optimizer = EVERY_OPTIMIZER[name](model.named_parameters())
    assert [size > 0 for size in optimizer.state_bytes().values()] == [False] * 4 + [True] * 2
    model(INPUT.to(dtype))
    other = plain_model(model, dtype)
    ordinary = EVERY_OPTIMIZER[name](other.named_parameters())
    train(model, optimizer)
    train(other, ordinary)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert_same_state(states(model, optimizer), states(other, ordinary))
    assert optimizer.state_bytes() == ordinary.state_bytes()


@every_optimizer
@pytest.mark.parametrize("order", ["optimizer first", "model first"])
def test_checkpoints_are_loaded_before_the_shapes_are_known_or_after(name, order):
    straight = lazy_model()
    optimizer = EVERY_OPTIMIZER[name](straight.parameters())
    train(straight, optimizer)
    saved = copy.deepcopy([optimizer.state_dict(), straight.state_dict()])
    train(straight, optimizer)

    model = lazy_model()
    resumed = EVERY_OPTIMIZER[name](model.parameters(), **({"seed": 9} if "ketch" in name else {}))
    if order == "model first":
        model.load_state_dict(saved[1])
        resumed.load_state_dict(saved[0])
    else:
        resumed.load_state_dict(saved[0])
        assert resumed.num_bytes == optimizer.num_bytes
        again = resumed.state_dict()["state"]
        assert_same_state([again[i] for i in range(6)], [saved[0]["state"][i] for i in range(6)])
        model.load_state_dict(saved[1])
    train(model, resumed)
    assert all(map(torch.equal, model.parameters(), straight.parameters()))
    assert_same_state(states(model, resumed), states(straight, optimizer))


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_first_step():
    model = lazy_model()
    optimizer = optim.FactoredAdam(model.parameters(), min_compressed_numel=0)
    other = model_of(nn.Linear(5, 8), nn.Linear(8, 4))
    saved = optim.FactoredAdam(other.parameters(), min_compressed_numel=0).state_dict()
    optimizer.load_state_dict(saved)
    model(INPUT).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"keeps .*\(8, 5\).* for parameter 0; allowed: .*\(8, 6"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_made_before_the_shapes_are_known_go_on_alike(way):
    model = lazy_model()
    optimizer = optim.Adam(model.parameters())
    source = lazy_model()
    trained = optim.Adam(source.parameters())
    train(source, trained)
    optimizer.load_state_dict(trained.state_dict())
    if way == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    for each in (model, other):
        each.load_state_dict(source.state_dict())
    train(model, optimizer)
    train(other, copied)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert_same_state(states(model, optimizer), states(other, copied))


def test_groups_of_uninitialized_parameters_can_be_added():
    first, second = nn.LazyLinear(3), nn.LazyLinear(2)
    optimizer = optim.SketchAdam(first.parameters(), lr=0.1, min_compressed_numel=0)
    optimizer.add_param_group({"params": list(second.parameters()), "lr": 0.2})
    assert optimizer.num_bytes == 0 and optimizer.state_dict()["state"] == {}
    optimizer.step()
    second(first(INPUT)).sum().backward()
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [1] * 4


def test_what_needs_a_shape_or_another_dtype_is_refused_with_the_remedy():
    module = nn.LazyLinear(3)
    optimizer = optim.FactoredAdam(module.parameters())
    with pytest.raises(ValueError, match="is uninitialized, .* call the lazy module once before"):
        optimizer.delegate_second_moment(module.weight)
    assert optimizer.num_bytes == 0
    with pytest.raises(ValueError, match="an uninitialized parameter is torch.strided torch.compl"):
        optim.SM3(nn.LazyLinear(3, dtype=torch.complex64).parameters())
    module(INPUT)
    assert optimizer.delegate_second_moment(module.weight) is not None
