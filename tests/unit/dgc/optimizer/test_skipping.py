"""A step with an infinity or NaN on one rank leaves no trace on any; loss scales follow it."""

import logging

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.optimizer.undone import MAX_IN_A_ROW
from tests.unit.dgc.method import CHOICES, Job, assert_equal, combinations, run_jobs
from tests.unit.dgc.test_method import label

INFINITY, NAN = float("inf"), float("nan")
DEFAULTS = {key: values[0] for key, values in CHOICES.items()}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("combination", list(combinations(num_random=10))[::3], ids=label)
def test_a_bad_gradient_of_one_rank_touches_nothing_anywhere(combination, caplog):
    """Whichever tensor it is in, sent sparsely or densely; and training goes on as if not."""

    def work(job, is_disturbed):
        for step in range(4):
            job.step()
            if is_disturbed:
                before, data = job.state(), job.generator.get_state()
                job.step(
                    (step, (INFINITY, NAN, -INFINITY)[step % 3]) if job.comm.rank == 1 else None
                )
                assert job.optimizer.stats.skipped
                assert_equal(job.state(), before)
                job.generator.set_state(data)
        return job.state()

    with caplog.at_level(logging.WARNING):
        disturbed = run_jobs(2, *combination, lambda job: work(job, True))
    assert sum("step undone" in record.message for record in caplog.records) == 4  # rank 0's only
    assert_equal(disturbed, run_jobs(2, *combination, lambda job: work(job, False)))


def test_the_message_names_the_tensor_and_the_rank(caplog):
    def work(job):
        job.step((0, NAN) if job.comm.rank == 1 else None)

    with caplog.at_level(logging.WARNING):
        run_jobs(3, "factored", DEFAULTS, work)
    assert "the gradient of 0.weight (rank 1) has infinite or NaN entries" in caplog.text


def test_a_square_that_float32_cannot_hold_counts_as_infinite():
    def work(job):
        before = job.state()
        job.step((0, 1e25))
        assert_equal(job.state(), before)
        return job.optimizer.stats.skipped

    assert run_jobs(1, "factored", DEFAULTS, work) == ["0.weight (rank 0)"]


def test_a_run_that_only_skips_ends_on_every_rank():
    def work(job):
        for _ in range(MAX_IN_A_ROW - 1):
            job.step((0, NAN))
        with pytest.raises(FloatingPointError, match=f"the {MAX_IN_A_ROW}th step in a row"):
            job.step((0, NAN))

    run_jobs(2, "sgd", DEFAULTS, work)


def scaler(**settings):
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, **settings)


@pytest.mark.parametrize("clip", [None, "global", "tensor"])
@pytest.mark.parametrize("name", ["factored", "momentum", "torch adam"])
def test_a_loss_scale_that_is_a_power_of_2_changes_no_bit(name, clip):
    choice = {**DEFAULTS, "clip": clip, "residual_dtype": "int8", "micro_batches": 2}

    def work(job):
        for _ in range(3):
            job.step()
        return job.state()

    scaled = run_local(2, lambda comm: _with_scaler(comm, name, choice, work))
    assert_equal(scaled, run_jobs(2, name, choice, work))


def _with_scaler(comm, name, choice, work):
    return work(Job(comm, name, choice, grad_scaler=scaler()))


@pytest.mark.parametrize("clip", [None, "global"])
def test_every_ranks_scale_falls_when_one_overflows(clip):
    choice = {**DEFAULTS, "clip": clip}

    def work(job):
        job.step()
        assert job.scaler.get_scale() == 2.0**10
        before = job.state()
        job.step((0, INFINITY) if job.comm.rank == 1 else None)
        assert_equal(job.state(), before)
        return job.scaler.get_scale()

    assert run_local(2, lambda comm: _with_scaler(comm, "factored", choice, work)) == [2.0**9] * 2


def test_a_scale_grows_after_enough_clean_steps():
    def work(comm):
        weight = nn.Parameter(torch.zeros(30, 40))
        mine = scaler(growth_interval=3)
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1), [("w", weight)], comm=comm,
            compression=Compression(density=0.01), grad_scaler=mine,
        )  # fmt: skip
        for _ in range(3):
            mine.scale(weight.sum()).backward()
            mine.step(optimizer)
            mine.update()
        return mine.get_scale()

    assert run_local(1, work) == [2.0**11]
