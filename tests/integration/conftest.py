import json
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

    def start(self, *extra, launcher="mpirun", num_ranks=2, **settings) -> jobs.Job:
        self._num_logs += 1
        log = self._folder / f"log{self._num_logs}"
        return jobs.start(launcher, num_ranks, self.words(*extra, **settings), log)

    def run(self, *extra, timeout=150, **settings) -> jobs.Outcome:
        return self.start(*extra, **settings).wait(timeout)

    def folder(self, runs="runs") -> Path:
        (folder,) = (self._folder / runs).iterdir()
        return folder

    def result(self, runs="runs") -> dict:
        return json.loads((self.folder(runs) / "result.json").read_text())


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)
