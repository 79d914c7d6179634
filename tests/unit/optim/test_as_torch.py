"""What torch's own tests ask of every optimizer, asked of ours, with torch's inputs for them.

After test/test_optim.py of PyTorch, written anew. Of its tests these do not apply, and why:
    foreach, fused, capturable, differentiable, mixed device, graphs: refused, see REFUSED.
    complex parameters: refused; to DistributedOptimizer they are pairs of reals.
    a tensor for a rate that is a parameter of the loss: needs differentiable steps.
    peak memory: benchmarks/optimizer_speed.py measures it, and tests/unit/memory predicts it.
    sparse equals dense: ours leave alone what did not arrive (see MomentOptimizer).
"""

import copy
import inspect
import io
import pickle
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, optimizer
from torch.optim.swa_utils import SWALR, AveragedModel

import optim
from tests.defaults import assert_same
from tests.tolerances import assert_close
from tests.unit.optim.helpers import EVERY_OPTIMIZER, assert_same_state, copy_of_state, parameter

every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)

# ours, torch's, and the options that torch's has if nothing is said and ours has not
COUNTERPARTS = {
    "Adam": (optim.Adam, torch.optim.Adam, {}),
    "AdamW": (partial(optim.Adam, decoupled_weight_decay=True), torch.optim.AdamW,
              {"weight_decay": 0.01}),
    "RMSprop": (optim.RMSprop, torch.optim.RMSprop, {}),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {}),
    "SGD": (optim.Momentum, torch.optim.SGD, {"momentum": 0}),
}  # fmt: skip
every_counterpart = pytest.mark.parametrize("name", COUNTERPARTS)

# torch's keyword -> a value that is refused, and why
REFUSED = {
    "amsgrad": (True, "largest second moment is not kept"),
    "centered": (True, "mean gradient is not kept"),
    "nesterov": (True, "torch.optim.SGD has"),
    "dampening": (0.5, "torch.optim.SGD dampens"),
    "lr_decay": (0.5, "let a scheduler do it"),
    "initial_accumulator_value": (0.1, "set eps"),
    "foreach": (True, "all tensors are stepped together"),
    "fused": (True, "all tensors are stepped together"),
    "capturable": (True, "CUDA graph would repeat"),
    "differentiable": (True, "do not flow through a step"),
}
# torch's message -> ours, where another option of the same call is refused first
OTHER_REFUSALS = {
    "lr as a Tensor is not supported for capturable=False and foreach=True": "foreach is True",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "foreach is",
}


@pytest.fixture(scope="module")
def machinery():
    """torch's own inputs for tests of optimizers; the import, of seconds, changes torch for all."""
    path, filters = list(sys.path), list(warnings.filters)
    from torch.testing._internal import common_optimizers  # needs the package expecttest

    sys.path[:], warnings.filters[:] = path, filters
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common_optimizers


def info(machinery, name):
    """Return torch's description of an optimizer, with ours for its own."""
    ours, theirs, _ = COUNTERPARTS[name]
    (found,) = (entry for entry in machinery.optim_db if entry.optim_cls is theirs)
    return machinery.OptimizerInfo(
        ours, optim_inputs_func=found.optim_inputs_func,
        optim_error_inputs_func=found.optim_error_inputs_func, supported_impls=(),
        supports_sparse=True, supports_complex=False,
    )  # fmt: skip


class Problem:
    """(W x + b)^2, of a strided W, and what lowers it."""

    def __init__(self, make, dtype=torch.float32, groups=None):
        generator = torch.Generator().manual_seed(0)
        weight, bias, self.input = (
            torch.randn(shape, generator=generator).to(dtype) for shape in ((10, 5, 2), 10, 5)
        )
        self.weight, self.bias = nn.Parameter(weight[..., 0]), nn.Parameter(bias)
        self.optimizer = make(groups(self.weight, self.bias) if groups else self.parameters)

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def loss(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def run(self, num_steps):
        return [self.optimizer.step(self.loss).item() for _ in range(num_steps)]


# ---- with torch's inputs -----------------------------------------------------------------------


@every_counterpart
def test_torch_s_arguments_are_there_in_its_order_with_its_defaults(name):
    ours, theirs, differs = COUNTERPARTS[name]
    mine = inspect.signature(ours).parameters
    for place, (option, expected) in enumerate(inspect.signature(theirs).parameters.items()):
        assert option in mine, option
        if expected.kind is expected.POSITIONAL_OR_KEYWORD:
            assert list(mine)[place] == option
        if option in differs:
            assert mine[option].default != differs[option] == expected.default
        else:
            assert mine[option].default == expected.default


@every_counterpart
def test_torch_s_inputs_give_torch_s_steps_or_are_refused_by_name(name, machinery):
    ours, theirs, differs = COUNTERPARTS[name]
    for given in info(machinery, name).optim_inputs_func("cpu"):
        options = {**differs, **given.kwargs}
        if refused := [option for option in options if option in REFUSED]:
            with pytest.raises(ValueError, match=REFUSED[refused[0]][1]):
                Problem(lambda params, o=options: ours(params, **o))
            continue
        mine, other = (Problem(lambda p, k=k, o=options: k(p, **o)) for k in (ours, theirs))
        assert type(mine.optimizer).__name__ in repr(mine.optimizer)
        losses = mine.run(10)
        assert (losses[0] < losses[-1]) == options.get("maximize", False)
        assert_close(torch.tensor(losses), torch.tensor(other.run(10)))
        for p, q in zip(mine.parameters, other.parameters, strict=True):
            assert_close(p.detach(), q.detach())


def test_options_that_are_tensors_give_torch_s_steps_and_those_of_their_numbers():
    lr, betas, decay = torch.tensor([[0.01]]), (0.9, 0.99), torch.tensor(0.1)
    tensors = {"lr": lr, "betas": tuple(map(torch.tensor, betas)), "weight_decay": 0.1}
    sgd = {"lr": lr, "weight_decay": decay, "momentum": 0.9}
    for name, options in (("Adam", tensors), ("AdamW", tensors), ("SGD", sgd)):
        numbers = {
            k: tuple(map(float, v)) if k == "betas" else float(v) for k, v in options.items()
        }
        ours, theirs, _ = COUNTERPARTS[name]
        cases = ((ours, options), (theirs, options), (ours, numbers))
        mine, other, same = (Problem(lambda p, k=k, o=o: k(p, **o)) for k, o in cases)
        for problem in (mine, other, same):
            problem.run(3)
        for p, q in zip(mine.parameters, other.parameters, strict=True):
            assert_close(p.detach(), q.detach())
        assert all(map(torch.equal, mine.parameters, same.parameters))


@every_counterpart
def test_bad_inputs_raise_what_torch_raises(name, machinery):
    ours = COUNTERPARTS[name][0]
    for case in info(machinery, name).optim_error_inputs_func("cpu", torch.float32):
        given = case.optimizer_error_input
        message = OTHER_REFUSALS.get(case.error_regex, case.error_regex)
        if issubclass(case.error_type, Warning):
            with pytest.warns(case.error_type, match=message):
                ours(given.params, **given.kwargs)
            continue
        with pytest.raises(case.error_type, match=message):
            ours(given.params, **given.kwargs)


@every_optimizer
def test_parameters_that_cannot_be_raise_what_torch_raises(name, machinery):
    make = EVERY_OPTIMIZER[name]
    for case in machinery.get_error_inputs_for_all_optims("cpu", torch.float32):
        given = case.optimizer_error_input
        if issubclass(case.error_type, Warning):
            continue
        with pytest.raises(case.error_type, match=case.error_regex):
            make(given.params, **given.kwargs)
    p = parameter(3)
    for params, error, message in (
        (None, TypeError, "'NoneType' object is not iterable"),
        ([], ValueError, "an empty parameter list"),
        ([{"params": {p}}], TypeError, "ordered collections"),
        ([p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([p.tolist()], TypeError, "can only optimize Tensors"),
        (
            [nn.Parameter(p.detach().to(torch.complex64))],
            ValueError,
            "torch.complex64; allowed: dense and",
        ),
    ):
        for each in (make, torch.optim.SGD):
            if each is make or "complex" not in message:
                with pytest.raises(error, match=message):
                    each(params)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        make(None, lr=-1)
    for option, value in (("lr", "fast"), ("lr", None), ("weight_decay", torch.ones(2))):
        with pytest.raises(ValueError, match=f"{option} is .*; allowed: 0 or more, and finite"):
            make([p], **{option: value})


@every_optimizer
def test_other_values_of_torch_s_keywords_are_refused_wherever_they_are_given(name):
    make = EVERY_OPTIMIZER[name]
    known = [k for k in REFUSED if k in inspect.signature(make.func).parameters]
    assert {"foreach", "fused", "capturable", "differentiable"} <= set(known)
    for keyword in known:
        value, reason = REFUSED[keyword]
        message = f"{keyword} is {value}; allowed: .*{reason}"
        p, q = parameter(3, 4), parameter(5)
        with pytest.raises(ValueError, match=message):
            make([p], **{keyword: value})
        with pytest.raises(ValueError, match=message):
            make([{"params": [p], keyword: value}])
        made = make([p], **{keyword: type(value)(0)})
        made.add_param_group({"params": [q], keyword: 0})
        with pytest.raises(ValueError, match=message):
            made.add_param_group({"params": [parameter(2)], keyword: value})
        assert len(made.param_groups) == 2 and len(made.state) == 2
        p.grad, before = torch.ones(3, 4), p.detach().clone()
        made.param_groups[1][keyword] = value
        with pytest.raises(ValueError, match=message):
            made.step()
        assert torch.equal(p, before)


# ---- steps -------------------------------------------------------------------------------------

MIXED = (torch.float32, torch.bfloat16, torch.float64)


@every_optimizer
def test_the_loss_goes_down_with_groups_rates_and_schedules_of_their_own(name):
    def groups(weight, bias):
        return [{"params": [("weight", weight)], "weight_decay": 0.1},
                {"params": [("bias", bias)], "lr": torch.tensor(1e-4)}]  # fmt: skip

    for maximize in (False, True):
        problem = Problem(lambda p, m=maximize: EVERY_OPTIMIZER[name](p, maximize=m), groups=groups)
        before = [p.detach().clone() for p in problem.parameters]
        schedule = lr_scheduler.StepLR(problem.optimizer, step_size=10, gamma=0.9)
        plateau = lr_scheduler.ReduceLROnPlateau(problem.optimizer, patience=2)
        losses = []
        for _ in range(25):
            losses += problem.run(1)
            schedule.step()
            plateau.step(losses[-1])
        assert (losses[0] < losses[-1]) == maximize
        moved = [(p - q).abs().mean() for p, q in zip(problem.parameters, before, strict=True)]
        assert moved[1] < 0.5 * moved[0]
        assert list(problem.optimizer.state_bytes()) == ["weight", "bias"]


@every_optimizer
def test_no_gradient_and_zero_gradients_move_nothing(name):
    problem = Problem(EVERY_OPTIMIZER[name])
    before, state = copy.deepcopy(problem.parameters), copy_of_state(problem.optimizer)
    problem.optimizer.step()
    assert_same_state(copy_of_state(problem.optimizer), state)
    for p in problem.parameters:
        p.grad = torch.zeros_like(p)
    problem.optimizer.step()
    assert all(map(torch.equal, problem.parameters, before))
    assert [kept["step"].item() for kept in problem.optimizer.state.values()] == [1, 1]


@every_optimizer
def test_parameters_of_several_dtypes_step_together_as_one_after_the_other(name):
    problems = [[Problem(EVERY_OPTIMIZER[name], dtype) for dtype in MIXED] for _ in range(2)]
    params = [[p for problem in each for p in problem.parameters] for each in problems]
    together, single = (EVERY_OPTIMIZER[name](each) for each in params)
    for _ in range(3):
        for problem in (*problems[0], *problems[1]):
            problem.loss()
        together.step()
        grads = [p.grad for p in params[1]]
        single.zero_grad()
        for p, grad in zip(params[1], grads, strict=True):
            p.grad = grad
            single.step()
            p.grad = None
    assert all(map(torch.equal, *params))
    assert_same_state(copy_of_state(together), copy_of_state(single))


def valley(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@every_optimizer
def test_rosenbrock_s_valley_is_descended_by_sparse_gradients(name):
    """One coordinate a step, its gradient in two entries of the same index."""
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = EVERY_OPTIMIZER[name]([p], **({"lr": 1e-4} if name.endswith("Momentum") else {}))
    start = valley(*p.tolist())
    for turn in range(100):
        x, y = p.tolist()
        grad = (-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2))[turn % 2]
        parts = torch.tensor([grad / 4, grad - grad / 4])
        p.grad = torch.sparse_coo_tensor([[turn % 2] * 2], parts, (2,), check_invariants=True)
        optimizer.step()
    assert valley(*p.tolist()) < start / 10


# ---- schedules, scaled losses, averages --------------------------------------------------------

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-3, total_steps=12),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_torch_moves_ours_as_it_moves_torch_s(schedule):
    for name, (ours, theirs, options) in COUNTERPARTS.items():
        if name == "Adagrad" and schedule in ("CyclicLR", "OneCycleLR"):
            with pytest.raises(ValueError, match="must support momentum or beta1"):
                SCHEDULES[schedule](ours([parameter(3)]))
            continue
        options = {
            **options,
            "lr": 1e-3,
            **({"momentum": 0.9} if name in ("RMSprop", "SGD") else {}),
        }
        problems = [Problem(lambda p, k=k, o=options: k(p, **o)) for k in (ours, theirs)]
        schedules = [SCHEDULES[schedule](problem.optimizer) for problem in problems]
        for _ in range(8):
            for problem, each in zip(problems, schedules, strict=True):
                problem.run(1)
                each.step()
            mine, other = (problem.optimizer.param_groups[0] for problem in problems)
            assert mine["lr"] != 1e-3 or schedule not in ("ExponentialLR", "OneCycleLR")
            for key in ("lr", "betas", "momentum"):
                assert mine.get(key) == other.get(key)
        for p, q in zip(*(problem.parameters for problem in problems), strict=True):
            assert_close(p.detach(), q.detach())


@every_optimizer
def test_a_scaled_loss_steps_as_an_unscaled_one_and_overflow_is_passed_over(name):
    plain, scaled = Problem(EVERY_OPTIMIZER[name]), Problem(EVERY_OPTIMIZER[name])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for turn in range(4):
        plain.run(1)
        for overflows in (True, False) if turn == 2 else (False,):
            scaled.optimizer.zero_grad()
            loss = (scaled.weight.mv(scaled.input) + scaled.bias).square().sum()
            scaler.scale(loss).backward()
            if overflows:
                scaled.weight.grad[3, 2] = torch.inf
            scaler.unscale_(scaled.optimizer)
            scaler.step(scaled.optimizer)
            scaler.update()
    assert all(map(torch.equal, plain.parameters, scaled.parameters))
    assert scaler.get_scale() == 2.0**9


def test_an_averaged_model_averages_what_ours_step():
    model = nn.Linear(5, 3)
    optimizer, averaged = optim.FactoredAdam(model.parameters(), lr=0.1), AveragedModel(model)
    seen = []
    for _ in range(3):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))


# ---- hooks -------------------------------------------------------------------------------------


@every_optimizer
def test_hooks_of_every_kind_are_called_in_torch_s_order(name):
    def calls(make):
        seen, problem = [], Problem(make)
        made, handles = problem.optimizer, []

        def note(what, result=None):
            return lambda *args: seen.append((what, len(args))) or result

        handles.append(optimizer.register_optimizer_step_pre_hook(note("global before")))
        handles.append(optimizer.register_optimizer_step_post_hook(note("global after")))
        handles.append(made.register_step_pre_hook(note("before")))
        handles.append(made.register_step_post_hook(note("after")))
        for moment in ("state_dict_pre", "state_dict_post", "load_state_dict_pre",
                       "load_state_dict_post"):  # fmt: skip
            register = getattr(made, f"register_{moment}_hook")
            handles += [register(note(moment)), register(note(f"{moment} first"), prepend=True)]
        problem.run(1)
        made.load_state_dict(made.state_dict())
        for handle in handles:
            handle.remove()
        before = len(seen)
        problem.run(1)
        made.load_state_dict(made.state_dict())
        assert len(seen) == before
        return seen

    assert calls(EVERY_OPTIMIZER[name]) == calls(torch.optim.Adam)


@every_optimizer
def test_hooks_can_change_what_is_stepped_saved_and_loaded(name):
    problem = Problem(EVERY_OPTIMIZER[name])
    made = problem.optimizer
    made.register_step_pre_hook(lambda *_: ((made, problem.loss), {}))
    assert made.step() is not None
    made.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 7})
    saved = made.state_dict()
    assert saved["more"] == 7

    def halve(_, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    before = made.param_groups[0]["lr"]
    made.register_load_state_dict_pre_hook(halve)
    made.load_state_dict(saved)
    assert made.param_groups[0]["lr"] == before / 2


# ---- checkpoints, copies -----------------------------------------------------------------------


OLDER = ("maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad", "nesterov")


def named(weight, bias):
    return [("weight", weight), ("bias", bias)]


@every_optimizer
@pytest.mark.parametrize("saver", [None, named])
@pytest.mark.parametrize("loader", [None, named])
def test_older_checkpoints_with_names_and_without_go_on_alike(name, saver, loader):
    """Options that were not there yet are missing, and `step` is a number."""
    straight, resumed = (Problem(EVERY_OPTIMIZER[name], groups=g) for g in (saver, loader))
    straight.run(3)
    saved = copy.deepcopy(straight.optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in OLDER:
            group.pop(key, None)
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    unchanged = copy.deepcopy(saved)
    resumed.optimizer.load_state_dict(saved)
    assert_same(saved, unchanged)
    with torch.no_grad():
        for p, q in zip(resumed.parameters, straight.parameters, strict=True):
            p.copy_(q)
    assert resumed.run(3) == straight.run(3)
    found, expected = (problem.optimizer.state_dict() for problem in (resumed, straight))
    assert ("param_names" in found["param_groups"][0]) == bool(saver or loader)
    for each in (found, expected):
        each["param_groups"] = [{**g, "param_names": None} for g in each["param_groups"]]
    assert found["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert_same(found["state"][key], state)
    assert found["param_groups"] == expected["param_groups"]


def by_name(optimizer, state):
    """What torch's documentation advises where the order of parameters has changed."""
    (mine,), (theirs,) = optimizer.param_groups, state["param_groups"]
    keys = dict(zip(theirs["param_names"], theirs["params"], strict=True))
    order = {"param_names": mine["param_names"], "params": [keys[n] for n in mine["param_names"]]}
    return {**state, "param_groups": [{**theirs, **order}]}


@every_optimizer
def test_a_hook_can_bring_the_parameters_into_another_order(name):
    straight = Problem(EVERY_OPTIMIZER[name], groups=named)
    other = Problem(EVERY_OPTIMIZER[name], groups=lambda w, b: named(w, b)[::-1])
    straight.run(3)
    other.optimizer.register_load_state_dict_pre_hook(by_name)
    other.optimizer.load_state_dict(straight.optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(other.parameters, straight.parameters, strict=True):
            p.copy_(q)
    assert other.run(3) == straight.run(3)
    assert all(map(torch.equal, other.parameters, straight.parameters))


@every_optimizer
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_whole_optimizers_are_copied_with_all_their_public_attributes(name, way):
    problem = Problem(EVERY_OPTIMIZER[name])
    lr_scheduler.StepLR(problem.optimizer, 10)  # wraps the method of the instance
    problem.run(2)
    if way == "deepcopy":
        other = copy.deepcopy(problem)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(problem))
    else:
        file = io.BytesIO()
        torch.save(problem, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    public = [{k for k in vars(x.optimizer) if not k.startswith("_")} for x in (problem, other)]
    assert public[0] - {"step"} <= public[1]
    assert problem.run(3) == other.run(3)
    assert all(map(torch.equal, problem.parameters, other.parameters))


def test_a_pickle_from_before_an_option_was_there_steps_and_loads():
    problem = Problem(optim.Adam)
    for options in (problem.optimizer.defaults, *problem.optimizer.param_groups):
        for key in ("amsgrad", "foreach", "fused", "capturable", "differentiable"):
            del options[key]
    other = pickle.loads(pickle.dumps(problem))
    other.run(2)
    fresh = Problem(optim.Adam)
    fresh.optimizer.load_state_dict(other.optimizer.state_dict())
    assert fresh.optimizer.param_groups[0]["amsgrad"] is False
