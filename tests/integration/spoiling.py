"""A config whose data has one image of NaNs, on one rank; used by test_failures.py."""

import fiddle as fdl

from configs.schema import Run
from tests.integration.failing import my_rank
from workloads.datasets import digits


class _Spoiling:
    def __init__(self, dataset, after: int) -> None:
        self._dataset, self._left = dataset, after

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int):
        self._left -= 1
        image, label = self._dataset[index]
        return (image * float("nan") if self._left == 0 and my_rank() == "1" else image), label


def spoiled_digits(after: int):
    splits = digits()
    return {"train": _Spoiling(splits["train"], after), "test": splits["test"]}


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(spoiled_digits, after=100)
