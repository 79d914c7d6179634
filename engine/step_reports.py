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
    """numbers: those that are still on a device, as float64, with their names."""

    values: dict[str, float]
    numbers: list[tuple[tuple[str, ...], Tensor]]
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
        by_kind: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, number in on_device.items():
            kind = number.device, number.dtype
            by_kind.setdefault(kind, {})[name] = number.detach().reshape(())
        numbers = [
            (tuple(some), torch.stack(list(some.values())).to(torch.float64))
            for some in by_kind.values()
        ]
        self._steps.append(_Step(dict(values), numbers, example, time.time()))
        if len(self._steps) >= self._every:
            self.write()

    def write(self) -> None:
        """Write what is not written yet. Waits for each GPU, once."""
        steps, self._steps = self._steps, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for step in steps:
            for _, numbers in step.numbers:
                by_device.setdefault(numbers.device, []).append(numbers)
        read = {device: iter(torch.cat(parts).tolist()) for device, parts in by_device.items()}
        for step in steps:
            values = dict(step.values)
            for names, numbers in step.numbers:
                values |= zip(names, read[numbers.device], strict=False)
            self._reporter.scalars(values, step.example, step.wall_time)
