"""Checkpoints, copies and pickles of optimizers."""

import copy
import pickle

import pytest
import torch

from optim import SM3, Adam, FactoredAdam, SketchAdam
from tests.unit.optim.helpers import (
    EVERY_OPTIMIZER,
    assert_same_state,
    copy_of_state,
    gradients,
    parameter,
    step,
)

every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)
SHAPES = [(12, 5), (6, 2, 9), (4,)]


def make(name, dtype=torch.float32, **options):
    parameters = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    return EVERY_OPTIMIZER[name](parameters, **options), parameters


def train(optimizer, parameters, turns):
    """Steps of dense, row-sparse and element-sparse gradients, which depend on the turn alone."""
    for turn in turns:
        for p in parameters:
            (p.grad,) = gradients(1, *p.shape, dtype=p.dtype, seed=turn)
        if turn % 3 == 1:
            parameters[0].grad = (parameters[0].grad * (torch.arange(12)[:, None] % 2)).to_sparse(1)
        if turn % 3 == 2:
            parameters[1].grad = (parameters[1].grad * (parameters[1].grad > 0)).to_sparse()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resuming_is_never_having_stopped(name, dtype, tmp_path):
    """torch's own load would round the state to the parameter's dtype (pytorch issue 43706)."""
    straight, parameters = make(name, dtype)
    train(straight, parameters, range(5))
    saved = {"optimizer": straight.state_dict(), "parameters": parameters}
    torch.save({**saved, "parameters": [p.detach() for p in parameters]}, tmp_path / "state.pt")
    train(straight, parameters, range(5, 10))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    hashes_of_its_own = {"seed": 9} if "ketch" in name else {}
    resumed, others = make(name, dtype, **hashes_of_its_own)
    resumed.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, value in zip(others, saved["parameters"], strict=True):
            p.copy_(value)
    train(resumed, others, range(5, 10))
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
    assert_same_state(copy_of_state(resumed), copy_of_state(straight))


@every_optimizer
def test_loaded_state_is_a_copy(name):
    (source, parameters), (optimizer, others) = make(name), make(name)
    train(source, parameters, range(2))
    saved = source.state_dict()
    optimizer.load_state_dict(saved)
    before = copy_of_state(source)
    train(optimizer, others, range(3))
    assert_same_state(copy_of_state(source), before)


@every_optimizer
def test_a_state_dict_holds_tensors_and_plain_values_only(name):
    def walk(value):
        if isinstance(value, dict):
            assert all(isinstance(key, (str, int)) for key in value)
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            assert value is None or type(value) in (torch.Tensor, str, int, float, bool)

    walk(make(name)[0].state_dict())


@every_optimizer
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(name, way):
    optimizer, parameters = make(name)
    train(optimizer, parameters, range(3))
    both = (optimizer, parameters)
    other, others = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(other, others, range(3, 6))
    assert not torch.equal(parameters[0], others[0])
    train(optimizer, parameters, range(3, 6))
    assert torch.equal(parameters[0], others[0])
    assert_same_state(copy_of_state(optimizer), copy_of_state(other))


@pytest.mark.parametrize(
    ("saver", "loader", "message"),
    [
        (SketchAdam, {"depth": 5}, r"\(3, 1, 5\).* parameter 0; allowed: .*\(5, 1, 5\)"),
        (SketchAdam, {"width": 7}, r"\(3, 1, 5\).* parameter 0; allowed: .*\(3, 7, 5\)"),
        (SketchAdam, {"first_moment": "full"}, r"keeps .*'exp_avg_seeds': \(3,\)"),
        (SM3, {}, "accumulator_0.* Make the optimizer with the options that the checkpoint"),
    ],
)
def test_checkpoints_of_another_structure_are_refused_and_change_nothing(saver, loader, message):
    saved = saver([parameter(12, 5)], lr=0.5, min_compressed_numel=0).state_dict()
    optimizer = SketchAdam([parameter(12, 5)], min_compressed_numel=0, **loader)
    before = copy_of_state(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_state(copy_of_state(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_checkpoints_of_other_shapes_or_groups_are_refused():
    saved = SM3([parameter(12, 5)]).state_dict()
    with pytest.raises(ValueError, match=r"keeps .*\(12, 1\).*; allowed: .*\(11, 1\)"):
        SM3([parameter(11, 5)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        SM3([parameter(12, 5), parameter(2)]).load_state_dict(saved)
    two_groups = [{"params": [parameter(12, 5)]}, {"params": [parameter(2)]}]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SM3(two_groups).load_state_dict(saved)


def test_seeds_that_are_no_integers_are_refused():
    optimizer = SketchAdam([parameter(12, 5)], min_compressed_numel=0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_seeds"] = saved["state"][0]["exp_avg_seeds"].float()
    with pytest.raises(ValueError, match="exp_avg_seeds is torch.float32; allowed: torch.int64"):
        optimizer.load_state_dict(saved)


@every_optimizer
def test_loading_moves_state_but_not_seeds_to_the_parameter_s_device(name):
    """The meta device stands for a GPU; tests/gpu has the real one."""
    source, parameters = make(name)
    train(source, parameters, range(2))
    elsewhere = [torch.nn.Parameter(p.detach().to("meta")) for p in parameters]
    optimizer = EVERY_OPTIMIZER[name](elsewhere)
    optimizer.load_state_dict(source.state_dict())
    for mine, theirs in zip(optimizer.state.values(), source.state.values(), strict=True):
        for key, value in mine.items():
            stays = key == "step" or key.endswith("_seeds")
            assert value.device.type == ("cpu" if stays else "meta"), key
            assert not stays or torch.equal(value, theirs[key])


def test_a_checkpoint_without_state_starts_anew():
    p, saved = parameter(3, 4), torch.optim.Adam([parameter(3, 4)]).state_dict()
    optimizer = Adam([p])
    step(optimizer, p, torch.ones(3, 4))
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 0 and not optimizer.state[p]["exp_avg"].any()


def test_a_checkpoint_of_torch_s_adam_is_taken_over():
    p, q = parameter(3, 4), parameter(3, 4)
    theirs = torch.optim.Adam([q])
    step(theirs, q, torch.ones(3, 4))
    optimizer = Adam([p])
    optimizer.load_state_dict(theirs.state_dict())
    assert_same_state([optimizer.state[p]], [theirs.state[q]])


def test_hooks_of_the_user_are_called_as_by_torch():
    p, calls = parameter(3, 4), []
    optimizer = FactoredAdam([p], min_compressed_numel=0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq_row"] += 1

    def double(_, state):
        state["state"][0]["exp_avg_sq_row"] *= 2

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(copy_of_state(o)))
    optimizer.load_state_dict(saved)
    assert calls[0][0]["exp_avg_sq_row"].tolist() == [2, 2, 2]


def test_a_checkpoint_with_impossible_options_changes_nothing():
    optimizer = SM3([parameter(3, 2)], lr=0.5)
    saved = optimizer.state_dict()
    saved["param_groups"] = [{**saved["param_groups"][0], "lr": -3.0}]
    with pytest.raises(ValueError, match="lr is -3.0; allowed"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 1
