"""Steps of many tensors on a GPU as launches, with temporary memory; they can be run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import sizeof
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy
import torch
from torch import Tensor

from parsimony_kernels.runtime.launches import Launches
from parsimony_kernels.runtime.operands import Rule
from parsimony_kernels.step.arguments import DeviceStep, Feeding, Items

Steps = Sequence[DeviceStep] | Sequence[Feeding]
Blocks = Callable[[Any], int]  # how many of them a step is


@dataclass(frozen=True)
class _Given:
    """Temporary memory of some steps."""

    count: int
    dtype: torch.dtype
    is_zeroed: bool
    names: tuple[str, ...]  # of the fields that point into it

    def memory(self, device: torch.device) -> Tensor:
        make = torch.zeros if self.is_zeroed else torch.empty
        return make(self.count, dtype=self.dtype, device=device)


class _Columns:
    """What differs from one run of a program to the next, as columns of the data that it uploads.

    Args: places: see Program. given: the temporary memory, and its address in the first run.
    """

    def __init__(
        self,
        data: numpy.ndarray,
        places: dict[tuple[int, ...], int],
        given: Sequence[tuple[_Given, int]],
        steps: Steps,
    ) -> None:
        self._data = data
        numbers = {id(step): number for number, step in enumerate(steps)}
        self._boundaries = numpy.array([step.boundary for step in steps], numpy.uint64)
        self._are_aligned = numpy.array([step.is_aligned for step in steps])
        self._given, self._pointers = [], []
        for ids, at in places.items():
            items = at + DeviceStep.items.offset, len(ids)
            rules = self._column(at + DeviceStep.rule.offset, len(ids), numpy.uint8, sizeof(Rule))
            grads = self._column(items[0] + Items.grad.offset, items[1], numpy.uint64)
            scales = self._column(items[0] + Items.scale.offset, items[1], numpy.uint64)
            aligned = self._column(items[0] + Items.is_aligned.offset, items[1], numpy.int32)
            chosen = numpy.array([numbers[each] for each in ids])
            self._given.append((chosen, rules, grads, scales, aligned))
            for number, (memory, address) in enumerate(given):
                self._find_pointers(at, len(ids), number, memory, address)

    def _column(self, at: int, count: int, dtype: Any, *length: int) -> numpy.ndarray:
        """Return a field of `count` steps, of which the first one's is at `at`."""
        strides = (sizeof(DeviceStep), 1)[: 1 + len(length)]
        return numpy.ndarray((count, *length), dtype, self._data, at, strides)

    def _find_pointers(
        self, at: int, count: int, number: int, memory: _Given, address: int
    ) -> None:
        """Find the pointers into one temporary memory, of `count` steps from `at` on."""
        end = address + memory.count * memory.dtype.itemsize
        for name in memory.names:
            pointers = self._column(at + getattr(DeviceStep, name).offset, count, numpy.uint64)
            inside = (pointers >= address) & (pointers < end)
            if inside.any():
                there = pointers[inside] - numpy.uint64(address)
                self._pointers.append((number, pointers, inside, there))

    def write(
        self,
        rules: Sequence[Rule],
        grads: Sequence[Tensor],
        scales: Sequence[Tensor | None],
        memories: list[int],
    ) -> None:
        bits = numpy.frombuffer(b"".join(rules), numpy.uint8).reshape(len(rules), -1)
        at = numpy.array([grad.data_ptr() for grad in grads], numpy.uint64)
        scales_at = [0 if scale is None else scale.data_ptr() for scale in scales]
        scaled = numpy.array(scales_at, numpy.uint64) if any(scales_at) else None
        are_aligned = self._are_aligned & (at % self._boundaries == 0)
        for chosen, of_rules, of_grads, of_scales, of_aligned in self._given:
            of_rules[:], of_grads[:] = bits[chosen], at[chosen]
            of_scales[:] = 0 if scaled is None else scaled[chosen]
            of_aligned[:] = are_aligned[chosen]
        for number, pointers, inside, there in self._pointers:
            pointers[inside] = there + numpy.uint64(memories[number])


class Program(Launches):
    """Launches in order, each of a kernel for some steps, of tensors on one device."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        super().__init__(device)
        self.steps = steps
        self._places: dict[tuple[int, ...], int] = {}  # of arrays of steps in what is uploaded
        self._given: list[tuple[_Given, Any]] = []  # and that memory, or where it was
        self._columns: _Columns | None = None

    def add(self, kernel: str, steps: Steps, blocks: Blocks, *, is_typed: bool = False) -> None:
        """Launch for these steps. is_typed: a kernel for each dtype, the parameter's, of them."""
        if is_typed:
            for dtype, same in groupby(sorted(steps, key=_dtype), _dtype):
                self.add(f"{kernel}_{dtype}", list(same), blocks)
            return
        numbers = list(map(blocks, steps))
        if any(numbers):
            self.launch(kernel, self._put(steps), numbers)

    def give(
        self, steps: Steps, dtype: torch.dtype, zeros: bool = False, **sizes: Blocks
    ) -> Tensor:
        """Give each step temporary memory of `sizes` elements, under these names of its fields."""
        counts = [[size(step) for size in sizes.values()] for step in steps]
        given = _Given(sum(map(sum, counts)), dtype, zeros, tuple(sizes))
        memory = given.memory(self.device)
        at = memory.data_ptr()
        for step, of_step in zip(steps, counts, strict=True):
            for name, count in zip(sizes, of_step, strict=True):
                setattr(step, name, at)
                at += count * dtype.itemsize
        self._given.append((given, memory))
        return memory

    def run(self) -> None:
        """Copy the steps, as they are now, to the device, and launch."""
        super().run()
        self._given = [(given, memory.data_ptr()) for given, memory in self._given]

    # ---- again ------------------------------------------------------------------------------

    def run_again(
        self,
        rules: Sequence[Rule],
        grads: Sequence[Tensor],
        scales: Sequence[Tensor | None] = (),
    ) -> None:
        """Do the same for the same steps, in their order, with other rules, dense gradients and
        their scales.

        Only what differs is written into the copy that is kept of all steps.
        """
        if self._columns is None:
            self._columns = _Columns(self._data, self._places, self._given, self.steps)
        memories = [given.memory(self.device) for given, _ in self._given]
        self._columns.write(rules, grads, scales, [memory.data_ptr() for memory in memories])
        self._launch()

    def _put(self, steps: Steps) -> int:
        key = tuple(map(id, steps))
        if key not in self._places:
            self._places[key] = self.append(steps)
        return self._places[key]


def _dtype(step: DeviceStep | Feeding) -> str:
    return step.dtype
