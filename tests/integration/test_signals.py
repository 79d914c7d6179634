"""SIGTERM, SIGINT and SIGUSR1 to launchers and ranks: they save and stop, nothing stays behind."""

import os
import signal
import time

import pytest

from tests import jobs
from tests.integration.conftest import KILLED, Runs
from tests.marked import Marked, marked

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("undisturbed")]
LAUNCHERS = {
    "train.sh": ["launch/train.sh", "-np", "2"],
    "train.sh --gloo": ["launch/train.sh", "-np", "2", "--gloo"],
    "train.sh --torch": ["launch/train.sh", "-np", "2", "--torch"],
    "mpirun.sh": ["launch/mpirun.sh", "-H", "localhost:2"],
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Launched:
    """A run that our launchers start, stop and take up, until it is complete."""

    def __init__(self, runs: Runs, processes: Marked, tmp_path) -> None:
        self.runs, self.processes, self._folder = runs, processes, tmp_path
        self._num_logs = 0

    def start(self, launcher: str, *options: str) -> None:
        self._num_logs += 1
        self.log = self._folder / f"launched{self._num_logs}"
        words = [*LAUNCHERS[launcher], *options, *self.runs.words(**KILLED)[1:]]
        self.job = jobs.Job(words, self.log)

    def await_moment(self, moment: str) -> None:
        last = self._newest_step()
        reached = {
            "starting": self.processes.ranks,
            "resuming": lambda: "folder of this run" in self.log.read_text(),
            "busy": lambda: self._newest_step() >= last + 4,
            "saving": self._is_saving,
        }[moment]
        deadline = time.monotonic() + 120
        while not reached():
            assert self.job.is_running, f"never {moment}: {self.log.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"never {moment}"
            time.sleep(0.002)

    def _newest_step(self) -> int:
        manifests = (self._folder / "runs").glob("*/checkpoints/step-*.json")
        return max((int(path.stem.removeprefix("step-")) for path in manifests), default=0)

    def _is_saving(self) -> bool:
        """Whether a part is there, whole or half-written, of a step that has no manifest yet."""
        parts = list((self._folder / "runs").glob("*/checkpoints/step-*.pt*"))
        newest = f"step-{self._newest_step():08d}"
        return any(path.name.partition(".")[0] > newest for path in parts)

    def send(self, number: int, target: str) -> None:
        pid = self.job.pid if target == "launcher" else max(self.processes.ranks())
        os.kill(pid, number)

    def end(self) -> jobs.Outcome:
        """Wait for the end, after which nothing of the job may be left."""
        outcome = self.job.wait(150)
        assert self.processes.left() == {}
        return outcome

    def stop(self, launcher: str, number: int, target: str, moment: str) -> float:
        """Start, send a signal at a moment, check what comes of it; return the seconds it took."""
        self.start(launcher)
        self.await_moment(moment)
        self.send(number, target)
        sent = time.monotonic()
        outcome = self.end()
        seconds = time.monotonic() - sent
        assert outcome.status == (130 if number == signal.SIGINT else 0), outcome.output[-5000:]
        assert outcome.output.count("stopped by a signal") == 1
        assert "Traceback" not in outcome.output
        return seconds

    def finish(self, launcher: str) -> str:
        self.start(launcher)
        outcome = self.end()
        assert outcome.status == 0, outcome.output[-5000:]
        return self.runs.result()["parameter_hash"]


@pytest.fixture
def launched(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PARSIMONY_VENV", str(jobs.BIN.parent))
    if not jobs.HAS_HOROVOD:
        pytest.skip("Horovod is not installed; run launch/setup.sh")
    with marked() as processes:
        yield Launched(runs, processes, tmp_path)


def test_a_run_that_is_stopped_again_and_again_and_loses_a_rank_keeps_its_bits(
    launched, undisturbed_hash
):
    launched.stop("train.sh", signal.SIGTERM, "launcher", "busy")
    launched.stop("train.sh", signal.SIGINT, "rank", "saving")
    launched.start("train.sh", "--restarts", "2")
    launched.await_moment("busy")
    launched.send(signal.SIGKILL, "rank")
    outcome = launched.end()
    assert outcome.status == 0, outcome.output[-5000:]
    assert outcome.output.count("launch: starting again") == 1
    assert outcome.output.count("resuming after step") == 2
    assert launched.runs.result()["parameter_hash"] == undisturbed_hash


@pytest.mark.long
@pytest.mark.parametrize("target", ["launcher", "rank"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_signal_at_every_moment_saves_and_stops(
    launched, launcher, number, target, undisturbed_hash
):
    for moment in ("busy", "resuming", "saving"):
        seconds = launched.stop(launcher, number, target, moment)
        print(f"| {launcher} | {number.name} | {target} | {moment} | {seconds:.1f} |")
    assert launched.finish(launcher) == undisturbed_hash


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_before_ranks_listen_ends_the_job(launched, launcher, number):
    """It has nothing to save then. A rank that already listens stops before its first step."""
    launched.start(launcher)
    launched.await_moment("starting")
    launched.send(number, "launcher")
    sent = time.monotonic()
    outcome = launched.end()
    allowed = {128 + number, 130 if number == signal.SIGINT else 0}
    assert outcome.status in allowed, outcome.output[-5000:]
    print(f"| {launcher} | {number.name} | launcher | starting | {time.monotonic() - sent:.1f} |")


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_signal_ends_the_job_at_once(launched, launcher):
    launched.start(launcher)
    launched.await_moment("busy")
    for pid in launched.processes.ranks():
        os.kill(pid, signal.SIGSTOP)  # ranks that will never come to the end of their step
    launched.send(signal.SIGTERM, "launcher")
    time.sleep(1.5)
    launched.send(signal.SIGTERM, "launcher")
    sent = time.monotonic()
    assert launched.end().status == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 10
