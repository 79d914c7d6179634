"""However a job dies, its processes are gone within seconds: ranks, fork servers, loaders."""

import os
import signal
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from launch import leftovers
from tests import jobs
from tests.integration.test_failures import rank_processes
from tests.long import long

pytestmark = pytest.mark.integration
SETTINGS = {"train__num_epochs": 400, "data__num_workers_per_rank": 2,
            "checkpoint__every_steps": 2}  # fmt: skip
WITHIN_S = 15  # on a busy machine; seen: below 2


def marked(mark):
    """Return (pid, command) of the processes that were started with a variable of this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words:
                    found.append((int(folder.name), words[:150]))
        except OSError:
            continue
    return found


def wait_until_gone(mark):
    deadline = time.monotonic() + WITHIN_S
    while left := marked(mark):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def files_of(ranks):
    """Return what multiprocessing has made for ranks: folders, and semaphores."""
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    names = [f"*parsimony-rank-*-{pid}-*" for pid in ranks]
    return [path for folder in folders for name in names for path in folder.glob(name)]


def kill(who, how, job):
    ranks = rank_processes(job)
    assert len(ranks) == 2
    launcher = [job._process.pid]
    loaders = [pid for pid in job.rank_pids() if pid not in ranks]
    for pid in {"rank": ranks[1:], "ranks": ranks, "launcher": launcher, "loaders": loaders}[who]:
        os.kill(pid, how)


@pytest.mark.parametrize(
    ("launcher", "who", "how"),
    [
        ("mpirun", "ranks", signal.SIGKILL),
        *(
            long(launcher, who, how)
            for launcher in jobs.LAUNCHERS
            for who in ("rank", "ranks", "launcher", "loaders")
            for how in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
            # horovodrun is mpirun's parent at most: without it the job goes on
            if (launcher, who) != ("horovodrun", "launcher")
        ),
    ],
)
def test_nothing_of_a_killed_job_is_left(runs, monkeypatch, launcher, who, how):
    monkeypatch.setenv("PARSIMONY_TEST_MARK", mark := uuid.uuid4().hex)
    job = runs.start(launcher=launcher, **SETTINGS)
    runs.wait_for_step(2, job)
    assert sum("forkserver" in words for _, words in marked(mark)) >= 6
    ranks = rank_processes(job)
    assert len(files_of(ranks)) > len(ranks), "they have other names now"
    kill(who, how, job)
    wait_until_gone(mark)
    leftovers.sweep()  # as the launchers do, and the next job
    assert files_of(ranks) == []


@pytest.mark.long
@pytest.mark.parametrize("after_s", [2, 2.5, 3, 3.5, 4, 4.5, 5, 6])
def test_nothing_is_left_of_a_job_that_is_killed_while_it_starts(runs, monkeypatch, after_s):
    monkeypatch.setenv("PARSIMONY_TEST_MARK", mark := uuid.uuid4().hex)
    job = runs.start(**SETTINGS)
    time.sleep(after_s)
    for pid in rank_processes(job):
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(mark)
