"""Reports of steps: each step's own numbers, read from the device only now and then."""

import math

import pytest
import torch

from dgc.comm.local import run_local
from engine.report import SilentReporter
from engine.step_reports import StepReports
from tests.emulation.pretended import Pretended, Watch
from tests.unit.engine.test_loop import make_trainer


class Noting(SilentReporter):
    def __init__(self):
        self.events = []

    def scalars(self, values, example, wall_time=None):
        self.events.append((example, values, wall_time))


def test_each_step_has_its_own_event_and_every_tenth_reads_them():
    reporter = Noting()
    reports = StepReports(reporter, 10)
    with Watch() as watch:
        for number in range(25):
            loss = math.nan if number == 13 else number
            loss = Pretended(torch.tensor([loss], dtype=torch.bfloat16))
            of_device = {"loss": loss, "threshold": Pretended(torch.tensor(number / 4))}
            reports.add({"lr": 0.1 * number}, {} if number == 5 else of_device, number)
            loss.fill_(-1)  # what is reported is what it was
            assert watch.num_waits == (number + 1) // 10
            assert len(reporter.events) == (number + 1) // 10 * 10
        reports.write()
    assert [example for example, _, _ in reporter.events] == list(range(25))
    for number, values, _ in reporter.events:
        assert values["lr"] == 0.1 * number
        if number == 5:
            assert values.keys() == {"lr"}
            continue
        assert values["threshold"] == number / 4
        assert math.isnan(values["loss"]) if number == 13 else values["loss"] == number
    times = [wall_time for _, _, wall_time in reporter.events]
    assert times == sorted(times) and times[0] < times[-1]
    reports.write()
    assert len(reporter.events) == 25


def test_of_one_step_each_is_written_at_once():
    reporter = Noting()
    StepReports(reporter, 1).add({}, {"loss": torch.tensor(2.0)}, 7)
    assert reporter.events[0][:2] == (7, {"loss": 2.0})


@pytest.mark.parametrize("every_steps", [None, 3])
def test_an_error_and_a_checkpoint_write_what_is_not_written_yet(tmp_path, every_steps):
    """Before the checkpoint: no event of a step that it holds may be missing."""

    def work(comm):
        trainer, reporter, flushed = make_trainer(comm, tmp_path), Noting(), []
        reporter.flush = lambda: flushed.append(len(reporter.events))
        trainer.reporter = trainer._step_reports._reporter = trainer._saver._reporter = reporter
        trainer.run.checkpoint.every_steps = every_steps
        train_step, calls = trainer.train_step, []

        def fail_at_last(batches):
            calls.append(1)
            return train_step(batches) if len(calls) < 6 else 1 // 0

        trainer.train_step = fail_at_last
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert sum("loss/train" in values for _, values, _ in reporter.events) == 5
        return flushed

    assert run_local(1, work) == [[3, 6] if every_steps else [5]]
