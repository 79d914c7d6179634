"""A config whose data has one image of NaNs, on one rank; used by test_failures.py."""

import fiddle as fdl

from configs.schema import Run
from tests.integration.failing import Failing, failing_digits, my_rank


class Spoiling(Failing):
    def __getitem__(self, index: int):
        self._left -= 1
        image, label = self._dataset[index]
        return (image * float("nan") if self._left == 0 and my_rank() == "1" else image), label


def configure(run: fdl.Config[Run]) -> None:
    run.dataset = fdl.Partial(failing_digits, after=100, kind=Spoiling)
