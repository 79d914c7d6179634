import pickle

import pytest
import torch

from optim import SM3, QuadraticWarmupLinearCooldown
from tests.tolerances import assert_close
from tests.unit.optim.helpers import gradients, parameter, step


def rates(num_steps, lr=1.0, **shape):
    optimizer = SM3([parameter(2, 2)], lr=lr)
    schedule, found = QuadraticWarmupLinearCooldown(optimizer, **shape), []
    for _ in range(num_steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_the_shape_is_quadratic_then_constant_then_linear():
    found = rates(12, warmup_steps=4, total_steps=10, cooldown_fraction=0.4)
    expected = [1 / 16, 4 / 16, 9 / 16, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert found == pytest.approx(expected)


def test_by_default_the_last_tenth_falls_and_nothing_need_rise():
    found = rates(20, warmup_steps=0, total_steps=20)
    assert found == pytest.approx([1.0] * 19 + [0.5])


def test_a_tensor_as_rate_is_scheduled_in_place():
    rate = torch.tensor(2.0)
    assert rates(2, rate, warmup_steps=2, total_steps=10) == [0.5, 2.0]


def test_a_saved_schedule_goes_on_where_it_was(tmp_path):
    def make(warmup_steps):
        optimizer = SM3([parameter(2, 2)], lr=1.0)
        return optimizer, QuadraticWarmupLinearCooldown(optimizer, 20, warmup_steps)

    (optimizer, schedule), (other, resumed) = make(8), make(2)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    states = {"schedule": schedule.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    resumed.load_state_dict(states["schedule"])
    other.load_state_dict(states["optimizer"])
    for _ in range(10):
        for each in (optimizer, schedule, other, resumed):
            each.step()
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    pickle.dumps(schedule.state_dict())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"warmup_steps": 19}, "warmup_steps is 19; allowed: 0 to 18, which the cool-down leaves"),
        ({"warmup_steps": -1}, "warmup_steps is -1; allowed: 0 to 18"),
        ({"warmup_steps": 1, "cooldown_fraction": 1.5}, "cooldown_fraction is 1.5; allowed: 0 to"),
    ],
)
def test_shapes_that_cannot_be_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        rates(1, total_steps=20, **shape)


def test_torch_s_averaged_model_is_the_polyak_average():
    p = parameter(2, 3)
    model = torch.nn.ParameterList([p])
    average, optimizer = torch.optim.swa_utils.AveragedModel(model), SM3([p])
    seen = []
    for grad in gradients(4, 2, 3):
        step(optimizer, p, grad)
        average.update_parameters(model)
        seen.append(p.detach().clone())
    assert_close(next(average.parameters()).detach(), torch.stack(seen).mean(0))


def test_a_twentieth_of_the_run_rises_unless_told_otherwise():
    found = rates(40, total_steps=40)
    assert found[:3] == pytest.approx([0.25, 1.0, 1.0])
