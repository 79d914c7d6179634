import json
import time
from pathlib import Path

import pytest

from tests import jobs

DIGITS = ["--configs", "configs/digits/resnet20.py"]
SPARSE = [*DIGITS, "configs/dgc/wm5.py", "configs/dgc/fp16.py"]
SHORT = {"train.num_epochs": 2, "train.lr_warmup_epochs": 1, "dgc.density": 0.01,
         "dgc.density_warmup_epochs": 1, "data.samples_per_epoch": 512}  # fmt: skip


class Runs:
    """Starts train.py on real ranks, in folders of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_logs = folder, 0

    def words(self, *extra: str, configs=SPARSE, runs="runs", **settings) -> list[str]:
        """`settings` are overrides, with __ for the dot."""
        overrides = dict(SHORT) if configs is SPARSE else {}
        overrides |= {name.replace("__", "."): value for name, value in settings.items()}
        flags = [w for name, value in overrides.items() for w in (f"--configs.{name}", str(value))]
        return ["train.py", *configs, *flags, "--runs", str(self._folder / runs), *extra]

    def start(self, *extra, launcher=jobs.DEFAULT, num_ranks=2, **settings) -> jobs.Job:
        self._num_logs += 1
        log = self._folder / f"log{self._num_logs}"
        return jobs.start(launcher, num_ranks, self.words(*extra, **settings), log)

    def run(self, *extra, timeout=150, **settings) -> jobs.Outcome:
        return self.start(*extra, **settings).wait(timeout)

    def straight_and_killed(self, *, step=14, **settings) -> dict:
        """Run undisturbed, and killed after a step's checkpoint and taken up; both must end alike.

        Returns the figures of the undisturbed run. Needs checkpoint__every_steps.
        """
        straight = self.run(runs="straight", **settings)
        assert straight.status == 0, straight.output[-5000:]
        job = self.start(**settings)
        deadline = time.monotonic() + 90
        while not list(self._folder.glob(f"runs/*/checkpoints/step-{step:08d}.json")):
            assert job.is_running and time.monotonic() < deadline, "to be killed in mid-epoch"
            time.sleep(0.005)
        job.kill()
        resumed = self.run(**settings)
        assert "resuming after step" in resumed.output, resumed.output[-5000:]
        one, other = self.result("straight"), self.result()
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
def undisturbed_hash(tmp_path_factory) -> str:
    """What two ranks come to in four epochs, with a checkpoint at every other step."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"))
    outcome = runs.run(checkpoint__every_steps=2, train__num_epochs=4)
    assert outcome.status == 0, outcome.output[-5000:]
    return runs.result()["parameter_hash"]
