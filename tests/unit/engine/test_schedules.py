import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    MultiStepLR,
    ReduceLROnPlateau,
)

from engine.schedules import LearningRate


def rates(num_steps, *, resume_at=None, make_scheduler=None, per="epoch", warmup=10, scale=4):
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, LearningRate(
            optimizer, scale=scale, warmup_steps=warmup, make_scheduler=make_scheduler,
            total_steps=60, steps_per_epoch=10, per=per,
        )  # fmt: skip

    optimizer, rate = make()
    seen = []
    for step in range(num_steps):
        if step == resume_at:
            saved = optimizer.state_dict(), rate.state_dict()
            optimizer, rate = make()
            optimizer.load_state_dict(saved[0])
            rate.load_state_dict(saved[1])
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rate.step()
    return seen


def test_warmup_rises_linearly_from_one_workers_rate_to_that_of_all():
    seen = rates(12)
    assert seen == pytest.approx([0.1 + 0.03 * step for step in range(11)] + [0.4])


@pytest.mark.parametrize("warmup", [10, 15])  # steps; an epoch has 10
def test_milestones_count_epochs_from_the_end_of_the_warmup(warmup):
    seen = rates(60, make_scheduler=partial(MultiStepLR, milestones=[2, 4]), warmup=warmup)
    assert seen[warmup + 19] == pytest.approx(0.4)
    assert seen[warmup + 20] == pytest.approx(0.04)
    assert seen[warmup + 40] == pytest.approx(0.004)


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_a_cosine_of_unset_length_ends_with_the_run(per):
    seen = rates(61, make_scheduler=CosineAnnealingLR, per=per)
    assert seen[10] == pytest.approx(0.4)
    done = 2 / 5 if per == "epoch" else 25 / 50
    assert seen[35] == pytest.approx(0.4 * (1 + math.cos(math.pi * done)) / 2)
    assert seen[60] == pytest.approx(0, abs=1e-9)
    assert seen[59] > 0


def test_a_length_that_is_set_is_kept():
    seen = rates(60, make_scheduler=partial(CosineAnnealingLR, T_max=2))
    assert seen[30] == pytest.approx(0, abs=1e-9)


def test_no_warmup_and_no_scaling_leave_the_rate_alone():
    assert rates(20, warmup=0, scale=1) == [0.1] * 20


@pytest.mark.parametrize("resume_at", [5, 10, 37])
@pytest.mark.parametrize("per", ["epoch", "step"])
def test_resuming_continues_to_the_bit(resume_at, per):
    make_scheduler = partial(CosineAnnealingLR)
    undisturbed = rates(60, make_scheduler=make_scheduler, per=per)
    assert rates(60, make_scheduler=make_scheduler, per=per, resume_at=resume_at) == undisturbed


def test_a_scheduler_with_a_rate_of_its_own_is_refused_where_rates_are_multiplied():
    with pytest.raises(ValueError, match="max_lr is not multiplied"):
        rates(1, make_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1))


def test_a_mode_that_is_another_schedulers_own_is_left_alone():
    cyclic = partial(torch.optim.lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.2, step_size_up=4)
    assert rates(9, make_scheduler=cyclic, per="step", warmup=0, scale=1)[4] == pytest.approx(0.2)


def test_its_state_is_plain_values(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for make_scheduler in (CosineAnnealingLR, partial(MultiStepLR, milestones=[1])):
        rate = LearningRate(
            optimizer, scale=2, warmup_steps=3, make_scheduler=make_scheduler,
            total_steps=10, steps_per_epoch=2, per="step",
        )  # fmt: skip
        torch.save(rate.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)


def cuts(metrics, *, smaller_is_better, resume_at=None):
    """Rates of epochs of two steps each, the first of them warm-up."""

    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        plateau = partial(ReduceLROnPlateau, factor=0.25, patience=0)
        return optimizer, LearningRate(
            optimizer, scale=1, warmup_steps=2, make_scheduler=plateau, total_steps=20,
            steps_per_epoch=2, per="epoch", smaller_is_better=smaller_is_better,
        )  # fmt: skip

    optimizer, rate = make()
    seen = []
    for epoch, metric in enumerate(metrics):
        if epoch == resume_at:
            saved = optimizer.state_dict(), rate.state_dict()
            optimizer, rate = make()
            optimizer.load_state_dict(saved[0])
            rate.load_state_dict(saved[1])
        seen.append(optimizer.param_groups[0]["lr"])
        for _ in range(2):
            optimizer.step()
            rate.step()
        rate.end_epoch(metric)
    return seen


def test_the_rate_is_cut_when_the_metric_stalls_whichever_way_is_better():
    falling = [9.0, 9.0, 5.0, 4.0, 4.5, 3.0, 3.0]  # the first is of the warm-up
    assert cuts(falling, smaller_is_better=True) == [1, 1, 1, 1, 1, 0.25, 0.25]
    assert cuts([-m for m in falling], smaller_is_better=False) == [1, 1, 1, 1, 1, 0.25, 0.25]
    assert cuts(falling, smaller_is_better=False) == [1, 1, 1, 0.25, 0.0625, 0.015625, 0.00390625]


@pytest.mark.parametrize("resume_at", [2, 4, 5])
def test_a_plateau_remembers_the_best_across_a_resume(resume_at):
    metrics = [9.0, 9.0, 5.0, 6.0, 4.0, 4.5, 3.0]
    whole = cuts(metrics, smaller_is_better=True)
    assert cuts(metrics, smaller_is_better=True, resume_at=resume_at) == whole


def test_a_plateau_by_step_is_refused():
    with pytest.raises(ValueError, match="schedule_lr_per to epoch"):
        rates(1, make_scheduler=ReduceLROnPlateau, per="step")


@pytest.mark.parametrize("make_scheduler", [None, partial(ExponentialLR, gamma=0.5)])
def test_a_rate_that_is_a_tensor_is_no_other_than_a_number_and_stays_the_configs(make_scheduler):
    """Two groups share it, schedulers fill it, and a second run is built from the same config."""
    given = torch.tensor(0.125)

    def steps(lr):
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=lr)
        rate = LearningRate(
            optimizer, scale=4, warmup_steps=2, make_scheduler=make_scheduler,
            total_steps=6, steps_per_epoch=1, per="step",
        )  # fmt: skip
        for _ in range(6):
            yield [float(group["lr"]) for group in optimizer.param_groups]
            optimizer.step()
            rate.step()

    assert list(steps(given)) == list(steps(given)) == list(steps(0.125))
    assert given == 0.125


SCHEDULES = {
    "constant": (None, "epoch"),
    "milestones": (partial(MultiStepLR, milestones=[1, 3]), "epoch"),
    "cosine": (CosineAnnealingLR, "step"),
    "one tensor": (partial(ExponentialLR, gamma=0.9), "epoch"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", [5, 24, 50])
def test_with_other_workers_the_rate_is_that_of_a_run_of_theirs(name, at):
    """Twice as many ranks make half as many steps an epoch, at twice the rate."""

    def make(scale, steps_per_epoch):
        rate = torch.tensor(0.1) if name == "one tensor" else 0.1
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        scheduler, per = SCHEDULES[name]
        return optimizer, LearningRate(
            optimizer, scale=scale, warmup_steps=steps_per_epoch, make_scheduler=scheduler,
            total_steps=6 * steps_per_epoch, steps_per_epoch=steps_per_epoch, per=per,
        )  # fmt: skip

    def go(optimizer, rate, num_steps):
        seen = []
        for _ in range(num_steps):
            seen.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            rate.step()
        return seen

    before = make(4, 10)
    go(*before, at)
    optimizer, rate = make(8, 5)
    optimizer.load_state_dict(before[0].state_dict())
    rate.take_over(before[1].state_dict(), at // 2)
    assert go(optimizer, rate, 30 - at // 2) == go(*make(8, 5), 30)[at // 2 :]


def test_with_other_workers_a_plateau_keeps_what_it_has_seen():
    def make(scale):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, LearningRate(
            optimizer, scale=scale, warmup_steps=0, total_steps=100, steps_per_epoch=10,
            make_scheduler=partial(ReduceLROnPlateau, patience=0), per="epoch",
        )  # fmt: skip

    optimizer, rate = make(4)
    for metric in (50.0, 40.0):  # no better: the rate falls to a tenth
        rate.step()
        rate.end_epoch(metric)
    other, resumed = make(2)
    other.load_state_dict(optimizer.state_dict())
    resumed.take_over(rate.state_dict(), 4)
    assert other.param_groups[0]["lr"] == pytest.approx(0.02)
    resumed.end_epoch(45.0)
    assert other.param_groups[0]["lr"] == pytest.approx(0.002)  # 50 is still the best


@pytest.mark.parametrize(
    ("scheduler", "warmup", "depends"),
    [
        (None, 10, False),
        (partial(MultiStepLR, milestones=[2]), 10, False),
        (CosineAnnealingLR, 10, True),
        (partial(CosineAnnealingLR, T_max=7), 10, False),
        (None, 70, True),  # a run of 6 epochs ended while its rate still rose
    ],
)
def test_whether_a_longer_run_would_have_had_other_rates(scheduler, warmup, depends):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    rate = LearningRate(
        optimizer, scale=4, warmup_steps=warmup, make_scheduler=scheduler, total_steps=100,
        steps_per_epoch=10, per="epoch",
    )  # fmt: skip
    assert rate.depends_on_length(6) == depends
