"""Planned steps: the bits of steps that are not, and whatever a plan depends on may change."""

import copy

import pytest
import torch

import optim
from optim import plans
from optim.moments import SEEDS
from parsimony_kernels.step import ops
from tests.unit.optim.helpers import EVERY_OPTIMIZER, gradients, parameter, row_sparse

SHAPES = [(40,), (), (12, 20), (30, 1), (3, 4, 5, 6), (600, 40), (8, 8)]  # the last is a square


def trained(optimizer, parameters, change=lambda optimizer, parameters, step: None, num_steps=7):
    """Step dense gradients; before each step, something may be changed."""
    optimizer.elements = {}
    grads = [list(gradients(num_steps, *p.shape, dtype=p.dtype)) for p in parameters]
    for step in range(num_steps):
        for p, of_p in zip(parameters, grads, strict=True):
            p.grad = of_p[step]
        change(optimizer, parameters, step)
        elements = optimizer.elements
        optimizer.elements = {}
        optimizer.step(elements=elements)
    return [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict()["state"])


@pytest.fixture
def num_planned(monkeypatch):
    """Return a list of how many steps each call has made that were planned."""
    counts, run = [], ops.step_planned
    monkeypatch.setattr(ops, "step_planned", lambda steps: (counts.append(len(steps)), run(steps)))
    return counts


def assert_equal(one, other):
    for p, q in zip(one[0], other[0], strict=True):
        assert torch.equal(p, q)
    for number, state in one[1].items():
        assert state.keys() == other[1][number].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, other[1][number][name]), (number, name)


def change_nothing(optimizer, parameters, step): ...


def change_rates(optimizer, parameters, step):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01 / (1 + step))
    optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 2)


def replace_parameters(optimizer, parameters, step):
    if step in (3, 4):
        for p in parameters:
            p.data = p.data.clone() if step == 3 else p.data.add(1)


def replace_state(optimizer, parameters, step):
    if step == 3:
        for p in parameters:
            state = optimizer.state[p]
            optimizer.state[p] = {name: tensor.clone() for name, tensor in state.items()}
    if step == 5:
        for p in parameters:
            for tensor in optimizer.state[p].values():
                tensor.data = tensor.data + 0


def take_seeds_of_another_rank(optimizer, parameters, step):
    """As a broadcast of the state does, in place."""
    if step == 4:
        for p in parameters:
            for name, tensor in optimizer.state[p].items():
                if name.endswith(SEEDS):
                    tensor.data.add_(17)


def transpose_in_place(optimizer, parameters, step):
    if step == 3:
        square = parameters[-1]
        square.data = square.data.t()
        square.grad = square.grad.t()


def give_other_gradients(optimizer, parameters, step):
    matrix = parameters[2]
    if step == 2:
        matrix.grad = None
    if step == 3:
        matrix.grad = row_sparse([1, 5], matrix.grad[[1, 5]], matrix.shape)
    if step == 4:
        matrix.grad = matrix.grad.t().contiguous().t()


def give_elements(optimizer, parameters, step):
    """A few, or none; weight decay that is decoupled acts on all others too."""
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.param_groups[0]["decoupled_weight_decay"] = step > 3
    for number, p in enumerate(parameters if step >= 2 else ()):
        indices = torch.arange(p.numel())[step % 3 :: 1 + number].contiguous()
        optimizer.elements[p] = indices, p.grad.view(-1)[indices].float()
        p.grad = None


def load_another_checkpoint(optimizer, parameters, step):
    if step == 4:
        loaded = copy.deepcopy(optimizer.state_dict())
        loaded["param_groups"][0]["lr"] = 0.002
        optimizer.load_state_dict(loaded)


def use_the_reference(optimizer, parameters, step):
    if step == 3:
        with ops.use("reference"):
            optimizer.step()


CHANGES = [
    change_nothing, change_rates, replace_parameters, replace_state,
    take_seeds_of_another_rank, transpose_in_place,
    give_other_gradients, give_elements, load_another_checkpoint, use_the_reference,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_planned_steps_have_the_bits_of_others_whatever_changes(
    name, dtype, num_planned, monkeypatch
):
    def outcome(change):
        parameters = [parameter(*shape, dtype=dtype, seed=k) for k, shape in enumerate(SHAPES)]
        return trained(EVERY_OPTIMIZER[name](parameters), parameters, change)

    for change in CHANGES if dtype == torch.float32 else (change_nothing,):
        num_planned.clear()
        planned = outcome(change)
        has_plans = any(count >= len(SHAPES) - 1 for count in num_planned)
        assert has_plans == (dtype != torch.float64)
        with monkeypatch.context() as patched:
            patched.setattr(plans.Plan, "holds", lambda *_: False)
            assert_equal(planned, outcome(change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_decay_of_16_bits_is_the_same_in_planned_steps_of_elements(dtype, num_planned):
    def run():
        start = torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
        p = torch.nn.Parameter(start.to(dtype))
        optimizer = optim.Adam([p], lr=0.05, betas=(0.0, 0.999), weight_decay=0.05,
                               decoupled_weight_decay=True)  # fmt: skip
        for step in range(4):
            optimizer.step(elements={p: (torch.tensor([step, 900]), torch.ones(2))})
        return p.detach()

    planned = run()
    assert sum(num_planned) >= 2
    with ops.use("reference"):
        assert torch.equal(planned, run())


def test_a_parameter_of_another_shape_in_the_same_memory_has_no_plan():
    p = torch.nn.Parameter(torch.zeros(60, 10))
    optimizer = optim.SM3([p], lr=0.1, momentum=0.0)
    for _ in range(2):
        optimizer.step(elements={p: (torch.tensor([3, 599]), torch.ones(2))})
    p.data = p.data[:30]
    with pytest.raises(ValueError, match=r"indices lie in 3\.\.599; allowed: 0\.\.299"):
        optimizer.step(elements={p: (torch.tensor([3, 599]), torch.ones(2))})


def test_a_plan_ends_with_what_it_was_made_for():
    p = parameter(30, 20)
    optimizer = optim.Adam([p], second_moment="factored", min_compressed_numel=0)
    trained(optimizer, [p])
    version = p._version
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p._version > version, "autograd would not see that the parameter has changed"
    optimizer.param_groups[0]["second_moment"] = "full"
    with pytest.raises(ValueError, match="cannot change between steps"):
        optimizer.step()
    optimizer.param_groups[0]["second_moment"] = "factored"
    optimizer.step()
    assert copy.deepcopy(optimizer)._plans == {}
    given = optimizer.delegate_second_moment(p)
    p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert not given.is_fed
    optimizer.reclaim_second_moment(p)
    before = optimizer.state[p]["exp_avg_sq_row"].clone()
    for _ in range(2):
        optimizer.step()
    assert not torch.equal(before, optimizer.state[p]["exp_avg_sq_row"])


@pytest.mark.parametrize("indices", [[3, 2], [2, 2], [-1, 2], [2, 600]])
def test_wrong_indices_are_refused_before_any_parameter_is_stepped(indices):
    parameters = [parameter(30, 20), parameter(30, 20)]
    optimizer = optim.Adam(parameters, decoupled_weight_decay=True, weight_decay=0.1)
    trained(optimizer, parameters)
    before = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    given = {p: (torch.tensor(at), torch.ones(2))
             for p, at in zip(parameters, ([1, 5], indices), strict=True)}  # fmt: skip
    for p in parameters:
        p.grad = None
    with pytest.raises(ValueError, match="indices (lie in|are not ascending)"):
        optimizer.step(elements=given)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before[0], strict=True))
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, before[1]["state"][number][n]) for n, t in state.items())
