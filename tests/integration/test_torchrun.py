"""torchrun itself: its own restarts, what it must not be asked for, and ranks that are alone."""

import os
import signal

import pytest

from tests import jobs
from tests.integration.conftest import KILLED
from tests.integration.test_failures import rank_processes

pytestmark = pytest.mark.integration


def torchrun(started, log, *options, **settings):
    words = ["torchrun", "--standalone", "--nproc-per-node=2", *options, *started.words(**settings)]
    return jobs.Job(words, log)


@pytest.mark.xdist_group("undisturbed")
def test_what_torchrun_starts_again_ends_as_if_nothing_had_happened(
    runs, tmp_path, undisturbed_hash
):
    job = torchrun(runs, tmp_path / "log", "--max-restarts=1", **KILLED)
    runs.wait_for_step(6, job)
    os.kill(rank_processes(job)[-1], signal.SIGKILL)
    outcome = job.wait()
    assert outcome.status == 0, outcome.output[-5000:]
    assert "resuming after step" in outcome.output
    assert runs.result()["parameter_hash"] == undisturbed_hash


@pytest.mark.long
def test_a_number_of_machines_that_may_change_is_refused(runs, tmp_path):
    options = ("--nnodes=1:2", "--rdzv-conf=last_call_timeout=1")
    outcome = torchrun(runs, tmp_path / "log", *options).wait()
    assert outcome.status != 0
    assert "elastic job of torchrun (--nnodes 1:2)" in outcome.output
    assert "Traceback" not in outcome.output.partition("torch/distributed/elastic")[0]


def test_ranks_that_are_alone_stop_with_the_remedy(runs, tmp_path, monkeypatch):
    """train.py is told to use Horovod, which knows nothing of torchrun's ranks."""
    words = ["torchrun", "--standalone", "--nproc-per-node=2", *runs.words("--comm", "horovod")]
    outcome = jobs.Job(words, tmp_path / "log").wait()
    assert outcome.status != 0
    assert "this process is alone as Horovod finds it, but WORLD_SIZE is 2" in outcome.output
    assert not (tmp_path / "runs").exists()
