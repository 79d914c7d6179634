import json
import shutil
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.marked import marked

DIGITS = ["--configs", "configs/digits/resnet20.py"]
SPARSE = [*DIGITS, "configs/dgc/wm5.py", "configs/dgc/fp16.py"]
SMALL = [*SPARSE, "tests/integration/perceptron.py"]  # its steps take a tenth of the time
SHORT = {"train.num_epochs": 2, "train.lr_warmup_epochs": 1, "dgc.density": 0.01,
         "dgc.density_warmup_epochs": 1, "data.samples_per_epoch": 512}  # fmt: skip
KILLED = {"checkpoint__every_steps": 2, "train__num_epochs": 8}
"""What runs have that are killed, or taken up: 64 steps, a checkpoint at every other one."""


class Runs:
    """Starts train.py on real ranks, in folders of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_logs = folder, 0

    def words(self, *extra: str, configs=SMALL, runs="runs", **settings) -> list[str]:
        """`settings` are overrides, with __ for the dot."""
        overrides = dict(SHORT) if configs[: len(SPARSE)] == SPARSE else {}
        overrides |= {name.replace("__", "."): value for name, value in settings.items()}
        flags = [w for name, value in overrides.items() for w in (f"--configs.{name}", str(value))]
        return ["train.py", *configs, *flags, "--runs", str(self._folder / runs), *extra]

    def start(self, *extra, launcher=jobs.DEFAULT, num_ranks=2, **settings) -> jobs.Job:
        self._num_logs += 1
        log = self._folder / f"log{self._num_logs}"
        return jobs.start(launcher, num_ranks, self.words(*extra, **settings), log)

    def run(self, *extra, timeout=150, **settings) -> jobs.Outcome:
        return self.start(*extra, **settings).wait(timeout)

    def succeed(self, *extra, **settings) -> str:
        """Run to the end; return what was printed."""
        outcome = self.run(*extra, **settings)
        assert outcome.status == 0, outcome.output[-5000:]
        return outcome.output

    def fail(self, *extra, **settings) -> str:
        """Run what must end with a failure; return what was printed."""
        outcome = self.run(*extra, **settings)
        assert outcome.status != 0, outcome.output[-5000:]
        return outcome.output

    def wait_for_step(self, step: int, job: jobs.Job, timeout=90) -> None:
        """Wait until a checkpoint of this step is whole; every_steps makes them within epochs."""
        deadline = time.monotonic() + timeout
        while not list(self._folder.glob(f"runs/*/checkpoints/step-{step:08d}.json")):
            assert job.is_running, "the run ended before it could be killed"
            assert time.monotonic() < deadline, f"no checkpoint of step {step} after {timeout} s"
            time.sleep(0.002)

    def resume(self, *extra, **settings) -> dict:
        """Take up a run that was killed; return its figures."""
        assert "resuming after step" in self.succeed(*extra, **settings)
        return self.result()

    def straight_and_killed(self, *extra, step=14, kill=jobs.Job.kill, **settings) -> dict:
        """Run undisturbed, and killed after a step's checkpoint and taken up; both must end alike.

        kill: ends the job. Returns the figures of the undisturbed run. Needs
        checkpoint__every_steps.
        """
        self.succeed(*extra, runs="straight", **settings)
        job = self.start(*extra, **settings)
        self.wait_for_step(step, job)
        kill(job)
        one, other = self.result("straight"), self.resume(*extra, **settings)
        assert one["parameter_hash"] == other["parameter_hash"]
        assert one["metrics"] == other["metrics"]  # of the average, where there is one
        assert one["skipped_steps"] == other["skipped_steps"]
        return one

    def folder(self, runs="runs") -> Path:
        (folder,) = (self._folder / runs).iterdir()
        return folder

    def result(self, runs="runs") -> dict:
        return json.loads((self.folder(runs) / "result.json").read_text())


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Runs:
    """A finished run of KILLED on two ranks. Look at it only; see `finished`."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"))
    runs.succeed(**KILLED)
    return runs


@pytest.fixture
def undisturbed_hash(undisturbed) -> str:
    return undisturbed.result()["parameter_hash"]


@pytest.fixture
def finished(undisturbed, runs, tmp_path) -> Runs:
    """A copy of the undisturbed run, to be started again, damaged or refused."""
    shutil.copytree(undisturbed.folder().parent, tmp_path / "runs")
    return runs


@pytest.fixture
def launched(runs, tmp_path, monkeypatch):
    """A run that launch/*.sh start. What is left of it at the end is killed."""
    from tests.integration.launched import Launched  # which needs this module

    monkeypatch.setenv("PARSIMONY_VENV", str(jobs.BIN.parent))
    if not jobs.HAS_HOROVOD:
        pytest.skip("Horovod is not installed; run launch/setup.sh")
    with marked() as processes:
        yield Launched(runs, processes, tmp_path)
