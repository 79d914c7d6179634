"""A config whose data fails on one rank, as a broken file would; used by test_failures.py."""

import os

import fiddle as fdl

from configs.schema import Run
from workloads.datasets import digits


def my_rank() -> str:
    names = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
    return next(os.environ[name] for name in names if name in os.environ)


class Failing:
    def __init__(self, dataset, after: int) -> None:
        self._dataset, self._left = dataset, after

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int):
        self._left -= 1
        if self._left < 0 and my_rank() == "1":
            raise OSError(f"sample {index} cannot be read")
        return self._dataset[index]


def failing_digits(after: int, kind=Failing):
    splits = digits()
    return {"train": kind(splits["train"], after), "test": splits["test"]}


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(failing_digits, after=200)
