"""Runs that launch/*.sh start, signalled and killed at chosen moments; used by two test files."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch.output import newest_step
from tests import jobs
from tests.integration.conftest import KILLED, Runs
from tests.marked import Marked

LAUNCHERS = {
    "train.sh": ["launch/train.sh", "-np", "2"],
    "train.sh --gloo": ["launch/train.sh", "-np", "2", "--gloo"],
    "train.sh --torch": ["launch/train.sh", "-np", "2", "--torch"],
    "mpirun.sh": ["launch/mpirun.sh", "-H", "localhost:2"],
}


class Launched:
    """A run that our launchers start, stop and take up, until it is complete."""

    def __init__(self, runs: Runs, processes: Marked, tmp_path) -> None:
        self.runs, self.processes, self._folder = runs, processes, tmp_path
        self._num_logs = 0

    def start(self, launcher: str, *options: str) -> None:
        self.start_words([*LAUNCHERS[launcher], *options])

    def start_words(self, words: Sequence[str]) -> None:
        """Start a launcher with these words before train.py's."""
        self._num_logs += 1
        self.log = self._folder / f"launched{self._num_logs}"
        self.job = jobs.Job([*words, *self.runs.words(**KILLED)[1:]], self.log)

    def await_moment(self, moment: str) -> None:
        last = self._newest_step()
        reached = {
            "starting": self.processes.ranks,
            "resuming": lambda: "folder of this run" in self.log.read_text(),
            "busy": lambda: self._newest_step() >= last + 4,
            "saving": self._is_saving,
        }[moment]
        self._await(reached, moment)

    def await_text(self, text: str, times: int = 1) -> None:
        """Wait until the job has printed something so often."""
        self._await(lambda: self.log.read_text().count(text) >= times, text)

    def _await(self, reached: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert self.job.is_running, f"never {what}: {self.log.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"never {what}"
            time.sleep(0.002)

    def _newest_step(self) -> int:
        return max((0, *map(newest_step, (self._folder / "runs").glob("*"))))

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
