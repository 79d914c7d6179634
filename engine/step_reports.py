"""What steps report: gathered on their device, and read for several steps in one copy.

To read a loss is to wait until the device has computed it. So numbers of a step that are on a
device are kept there until `every` steps are together; then each step's event is written, with its
own values, example and time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.report import Reporter, SilentReporter


@dataclass(frozen=True)
class _Step:
    """numbers: those that are still on the device, (n,) float64, which have these names."""

    values: dict[str, float]
    names: tuple[str, ...]
    numbers: Tensor | None
    example: int
    wall_time: float


class StepReports:
    """The reports of steps that have not been written yet.

    Args: every: as many steps are written together.
    """

    def __init__(self, reporter: Reporter | SilentReporter, every: int) -> None:
        self._reporter, self._every = reporter, every
        self._steps: list[_Step] = []

    def add(
        self, values: Mapping[str, float], on_device: Mapping[str, Tensor], example: int
    ) -> None:
        """Report a step. on_device: numbers, each a tensor of one element; they are copied."""
        parts = [number.detach().reshape(1).to(torch.float64) for number in on_device.values()]
        numbers = torch.cat(parts) if parts else None
        self._steps.append(_Step(dict(values), tuple(on_device), numbers, example, time.time()))
        if len(self._steps) >= self._every:
            self.write()

    def write(self) -> None:
        """Write what is not written yet. Waits for a GPU, once."""
        steps, self._steps = self._steps, []
        parts = [step.numbers for step in steps if step.numbers is not None]
        numbers = iter(torch.cat(parts).tolist() if parts else ())
        for step in steps:
            read = {name: next(numbers) for name in step.names}
            self._reporter.scalars({**step.values, **read}, step.example, step.wall_time)
