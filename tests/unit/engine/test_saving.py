"""When checkpoints are finished, and what a failure of one means for the run."""

import errno
import os
import time

import pytest

from dgc.comm.local import run_local
from engine.writing import WriteError
from tests.unit.engine.test_loop import batches, make_trainer, step


def trainer_after_a_step(comm, folder, asynchronous=False, on_error="stop"):
    trainer = make_trainer(comm, folder)
    trainer.run.checkpoint.asynchronous = asynchronous
    trainer.run.checkpoint.on_error = on_error
    trainer.batches["train"].start(0, 0, {})
    step(trainer, batches(comm, 1.0, 1.0))
    return trainer


def test_one_written_beside_training_is_finished_when_all_ranks_tell_that_it_is_written(tmp_path):
    def work(comm):
        trainer = trainer_after_a_step(comm, tmp_path, asynchronous=True)
        saver, checkpoints = trainer._saver, trainer.checkpoints
        trainer._save(is_best=False)
        assert checkpoints.pending_step == 1 and saver.saved_step is None
        while not checkpoints.is_written:
            time.sleep(0.01)
        trainer.notices.start(**(trainer._my_notices() if comm.rank else {}))
        trainer._heed(trainer.notices.finish())  # rank 0 has not told yet
        assert saver.saved_step is None
        trainer._ask()
        assert checkpoints.pending_step is None and saver.saved_step == 1
        progress = trainer.state.progress
        assert progress.num_checkpoints == 1 and progress.checkpoint_seconds > 0
        return checkpoints.load_latest().shared["progress"]["step"]

    assert run_local(2, work) == [1, 1]


def test_notices_of_one_checkpoint_are_not_taken_for_those_of_the_next(tmp_path):
    def work(comm):
        trainer = trainer_after_a_step(comm, tmp_path, asynchronous=True)
        trainer._save(is_best=False)
        while not trainer.checkpoints.is_written:
            time.sleep(0.01)
        trainer.notices.start(**trainer._my_notices())
        step(trainer, batches(comm, 1.0, 1.0))
        trainer._save(is_best=False)
        trainer._heed(trainer.notices.finish())
        assert (trainer._saver.saved_step, trainer.checkpoints.pending_step) == (1, 2)
        trainer._saver.finish()
        assert trainer._saver.saved_step == 2

    run_local(2, work)


@pytest.mark.parametrize("num_ranks_before", [2, 3])
def test_a_checkpoint_is_not_written_over_when_an_epoch_ends_that_has_no_step_left(
    tmp_path, num_ranks_before
):
    """A signal in the last step saves it; another start then ends the epoch, and saves as well."""
    folder = tmp_path / "checkpoints"

    def before(comm):
        trainer_after_a_step(comm, tmp_path)._save(is_best=False, is_last=True)

    def work(comm):
        trainer = trainer_after_a_step(comm, tmp_path)
        trainer._saver.saved_step = 1
        trainer.checkpoints.load_latest()
        trainer._save(is_best=False)
        trainer._save(is_best=True)
        if comm.rank == 0:
            assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")} == parts
        trainer._saver.saved_step = None
        assert trainer.checkpoints.load_best().keys() >= {"model", "progress"}
        return trainer.checkpoints.load_latest().world_size

    run_local(num_ranks_before, before)
    parts = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert len(parts) == num_ranks_before + 1
    assert run_local(2, work) == [num_ranks_before] * 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_after_a_failure_if_asked_but_does_not_end_with_one(
    tmp_path, monkeypatch, asynchronous
):
    real = os.fsync

    def fail(file):
        if ".rank-0001" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    def work(comm):
        trainer = trainer_after_a_step(comm, tmp_path, asynchronous, on_error="continue")
        told = []
        trainer._saver._reporter.say = told.append
        trainer._save(is_best=False)
        trainer._saver.finish()
        assert trainer._saver.saved_step is None and trainer.state.progress.num_checkpoints == 0
        assert "training goes on without a checkpoint of step 1: " in told[0]
        with pytest.raises(WriteError, match="rank 1: .*No space left on device"):
            trainer._save(is_best=False, is_last=True)

    monkeypatch.setattr(os, "fsync", fail)
    run_local(2, work)
