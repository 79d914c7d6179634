"""Steps of many tensors on a GPU together: each kernel is launched once for all that it is for.

What a kernel needs of each tensor is a DeviceStep. All of them are copied to the device at once,
from pinned memory, so that nothing waits.
Shapes: n rows of m columns make a parameter; k rows or elements of its gradient arrive.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import sizeof
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import numpy
import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import THREADS, launch
from parsimony_kernels.runtime.operands import Rule, SecondKind
from parsimony_kernels.step.arguments import Batch, DeviceStep, Items

MAX_BLOCKS = 2**20  # kernels stride over what is more

_STORED_TOGETHER = 32  # factored means that one block brings up to date

Steps = Sequence[DeviceStep]
Blocks = Callable[[DeviceStep], int]  # how many of them a step is


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
            aligned = self._column(items[0] + Items.is_aligned.offset, items[1], numpy.int32)
            chosen = numpy.array([numbers[each] for each in ids])
            self._given.append((chosen, rules, grads, aligned))
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

    def write(self, rules: Sequence[Rule], grads: Sequence[Tensor], memories: list[int]) -> None:
        bits = numpy.frombuffer(b"".join(rules), numpy.uint8).reshape(len(rules), -1)
        at = numpy.array([grad.data_ptr() for grad in grads], numpy.uint64)
        are_aligned = self._are_aligned & (at % self._boundaries == 0)
        for chosen, of_rules, of_grads, of_aligned in self._given:
            of_rules[:], of_grads[:] = bits[chosen], at[chosen]
            of_aligned[:] = are_aligned[chosen]
        for number, pointers, inside, there in self._pointers:
            pointers[inside] = there + numpy.uint64(memories[number])


class Program:
    """Launches in order, each of a kernel for some steps, of tensors on one device."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        self.steps, self.device = steps, device
        self._chunks: list[bytes | DeviceStep] = []
        self._size = 0
        self._places: dict[tuple[int, ...], int] = {}  # of arrays of steps in what is uploaded
        self._turns: list[tuple[str, int, int, int, int] | Callable[[], None]] = []
        self._given: list[tuple[_Given, Any]] = []  # and that memory, or where it was
        self._columns: _Columns | None = None

    def add(self, kernel: str, steps: Steps, blocks: Blocks, *, is_typed: bool = False) -> None:
        """Launch for these steps. is_typed: a kernel for each dtype, the parameter's, of them."""
        if is_typed:
            for dtype, same in groupby(sorted(steps, key=_dtype), _dtype):
                self.add(f"{kernel}_{dtype}", list(same), blocks)
            return
        ends = list(accumulate(map(blocks, steps)))
        if ends and ends[-1]:
            at = self._put(steps)
            ends_at = self._append((array("q", ends).tobytes(),))
            self._turns.append((kernel, at, ends_at, len(ends), ends[-1]))

    def call(self, function: Callable[[], None]) -> None:
        """Call this when the kernels before have been launched."""
        self._turns.append(function)

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
        self._data = numpy.frombuffer(bytearray().join(self._chunks), numpy.uint8)
        self._launch()
        self._given = [(given, memory.data_ptr()) for given, memory in self._given]

    def _launch(self) -> None:
        if not self._turns:
            return
        uploaded = _upload(torch.from_numpy(self._data), self.device)
        base = uploaded.data_ptr()
        for turn in self._turns:
            if callable(turn):
                turn()
                continue
            kernel, steps, ends, count, num_blocks = turn
            batch = Batch(base + steps, base + ends, count)
            launch(kernel, min(num_blocks, MAX_BLOCKS), batch, self.device)

    # ---- again ------------------------------------------------------------------------------

    def run_again(self, rules: Sequence[Rule], grads: Sequence[Tensor]) -> None:
        """Do the same for the same steps, in their order, with other rules and dense gradients.

        Only what differs is written into the copy that is kept of all steps.
        """
        if self._columns is None:
            self._columns = _Columns(self._data, self._places, self._given, self.steps)
        memories = [given.memory(self.device) for given, _ in self._given]
        self._columns.write(rules, grads, [memory.data_ptr() for memory in memories])
        self._launch()

    def _put(self, steps: Steps) -> int:
        key = tuple(map(id, steps))
        if key not in self._places:
            self._places[key] = self._append(steps)
        return self._places[key]

    def _append(self, chunks: Sequence[bytes | DeviceStep]) -> int:
        at = self._size
        self._chunks.extend(chunks)
        self._size += sum(memoryview(chunk).nbytes for chunk in chunks)
        return at


def _upload(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":  # emulated
        return host
    # The allocator of pinned memory gives it to nobody else before the copy is made.
    return torch.empty_like(host, pin_memory=True).copy_(host).to(device, non_blocking=True)


def _dtype(step: DeviceStep) -> str:
    return step.dtype


# ---- numbers of blocks ---------------------------------------------------------------------------


def _tiles(step: DeviceStep) -> int:
    return step.tiling.num_tiles


def _items(step: DeviceStep) -> int:
    return -(-step.num_items // THREADS)


def _rows_and_columns(step: DeviceStep) -> int:
    return -(-(step.num_items + step.dim) // THREADS)


def _means(step: DeviceStep) -> int:
    return -(-(step.num_items + step.dim) // _STORED_TOGETHER)


def _one(step: DeviceStep) -> int:
    return 1


# ---- programs ------------------------------------------------------------------------------------


def run_steps(steps: Steps, device: torch.device) -> Program:
    """Make these steps. What their sketches have been fed waits to be stored.

    Returns: the program, to be run again for dense gradients, if there are no sketches.
    """
    program = Program(steps, device)
    elements = [step for step in steps if step.is_elements]
    rows = [step for step in steps if not step.is_elements]
    covers = [step for step in rows if step.kind == SecondKind.COVER]
    _make_maxima(program, covers)
    _bring_up_to_date(program, [step for step in rows if step.kind != SecondKind.COVER])
    by_kernel: dict[str, list[DeviceStep]] = {}
    for step in rows:
        by_kernel.setdefault(_kernel(step), []).append(step)
    for name, of_kernel in by_kernel.items():
        program.add(f"step_{name}", of_kernel, _tiles, is_typed=True)
    program.add("cover_store", covers, _rows_and_columns)
    _step_elements(program, elements)
    program.run()
    return program


def run_observation(step: DeviceStep, device: torch.device) -> None:
    """Feed a second moment that is no sketch."""
    program = Program([step], device)
    if step.kind == SecondKind.FULL:
        program.add("observe_flat", [step], _tiles, is_typed=True)
    _bring_up_to_date(program, [step])
    program.run()


def find_wrong_positions(steps: Steps, device: torch.device) -> int | None:
    """See ops.find_wrong_positions."""
    sparse = [number for number, step in enumerate(steps) if not step.is_dense]
    program = Program(steps, device)
    chosen = [steps[number] for number in sparse]
    found = program.give(chosen, torch.int32, zeros=True, is_wrong=_one)
    program.add("find_wrong_positions", chosen, _items)
    program.run()
    return next((number for number, is_wrong in zip(sparse, found.tolist(), strict=True)
                 if is_wrong), None)  # fmt: skip


def _kernel(step: DeviceStep) -> str:
    if step.is_sketched:
        return "sketched"
    kinds = {SecondKind.COVER: "cover", SecondKind.FACTORED: "factored"}
    kind = "flat" if step.is_flat else kinds.get(step.kind, "rows")
    return f"{kind}_first" if step.first and kind != "rows" else kind


def _make_maxima(program: Program, steps: Steps) -> None:
    sizes = {"row_max": lambda step: step.num_items, "col_max": lambda step: step.dim}
    if steps:
        program.give(steps, torch.int32, zeros=True, **sizes)


def _bring_up_to_date(program: Program, steps: Steps) -> None:
    """Bring covers and factored means up to this step's, in a pass over the gradients alone."""
    covers = [step for step in steps if step.kind in (SecondKind.COVER, SecondKind.COVER_I)]
    _make_maxima(program, covers)
    program.add("cover_maxima", covers, _tiles, is_typed=True)
    program.add("cover_store", covers, _rows_and_columns)

    factored = [step for step in steps if step.kind == SecondKind.FACTORED]
    if factored:
        sizes = {
            "row_sums": lambda step: step.tiling.across * step.num_items,
            "col_sums": lambda step: step.tiling.num_tiles // step.tiling.across * step.dim,
        }
        program.give(factored, torch.float64, **sizes)
        program.give(factored, torch.float32, mean=_one)
    program.add("factored_mean", [step for step in factored if not step.is_dense], _one)
    program.add("factored_sums", factored, _tiles, is_typed=True)
    program.add("factored_store", factored, _means)
    program.add("factored_mean", factored, _one)


def _step_elements(program: Program, steps: Steps) -> None:
    covers = [step for step in steps if step.kind in (SecondKind.COVER, SecondKind.COVER_I)]
    first = [step for step in covers if step.kind == SecondKind.COVER_I]
    second = [step for step in covers if step.kind == SecondKind.COVER]
    if covers:
        program.give(covers, torch.float32, averages=lambda step: 2 * step.num_items)
    program.add("cover_averages", first, _items, is_typed=True)
    program.add("cover_raise", first, _items)
    _factor_elements(program, [step for step in steps if step.kind == SecondKind.FACTORED])
    program.add("step_elements", steps, _items, is_typed=True)
    program.add("cover_raise", second, _items)


def _factor_elements(program: Program, steps: Steps) -> None:
    """Bring the means up to this step's. The columns of all steps' elements are sorted together."""
    if not steps:
        return
    program.give(steps, torch.float32, mean=_one)
    program.give(steps, torch.float64, changes=lambda step: step.num_items)
    keys = program.give(steps, torch.int64, keys=lambda step: step.num_items)
    in_order = program.give(steps, torch.int64, sorted=lambda step: step.num_items)
    order = program.give(steps, torch.int64, order=lambda step: step.num_items)
    first_key = first_item = 0
    for step in steps:
        step.first_key, step.first_item = first_key, first_item
        first_key, first_item = first_key + step.dim, first_item + step.num_items
    program.add("factored_mean", steps, _one)
    program.add("factored_changes", steps, _items, is_typed=True)
    program.call(lambda: torch.sort(keys, stable=True, out=(in_order, order)))
    program.add("factored_raise", steps, _items)
    program.add("factored_mean", steps, _one)
