"""Steps of many tensors on a GPU together: each kernel is launched once for all that it is for.

What a kernel needs of each tensor is a DeviceStep. All of them are copied to the device at once,
from pinned memory, so that nothing waits.
Shapes: n rows of m columns make a parameter; k rows or elements of its gradient arrive.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import THREADS, launch
from parsimony_kernels.runtime.operands import SecondKind
from parsimony_kernels.step.arguments import Batch, DeviceStep

MAX_BLOCKS = 2**20  # kernels stride over what is more

_STORED_TOGETHER = 32  # factored means that one block brings up to date

Steps = Sequence[DeviceStep]
Blocks = Callable[[DeviceStep], int]  # how many of them a step is


class Program:
    """Launches in order, each of a kernel for some steps, of tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._chunks: list[bytes | DeviceStep] = []
        self._size = 0
        self._places: dict[tuple[int, ...], int] = {}  # of arrays of steps in what is uploaded
        self._turns: list[tuple[str, int, int, int, int] | Callable[[], None]] = []
        self._kept: list[Tensor] = []

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
        make = torch.zeros if zeros else torch.empty
        memory = make(sum(map(sum, counts)), dtype=dtype, device=self.device)
        at = memory.data_ptr()
        for step, of_step in zip(steps, counts, strict=True):
            for name, count in zip(sizes, of_step, strict=True):
                setattr(step, name, at)
                at += count * dtype.itemsize
        self._kept.append(memory)
        return memory

    def run(self) -> None:
        """Copy the steps, as they are now, to the device, and launch."""
        if not self._turns:
            return
        uploaded = _upload(bytearray().join(self._chunks), self.device)
        base = uploaded.data_ptr()
        for turn in self._turns:
            if callable(turn):
                turn()
                continue
            kernel, steps, ends, count, num_blocks = turn
            batch = Batch(base + steps, base + ends, count)
            launch(kernel, min(num_blocks, MAX_BLOCKS), batch, self.device)

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


def _upload(data: bytearray, device: torch.device) -> Tensor:
    host = torch.frombuffer(data, dtype=torch.uint8)
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


def run_steps(steps: Steps, device: torch.device, store_sketches: Callable[[], None]) -> None:
    """Make these steps. Their sketches have been fed; what waits to be stored is stored at the end.

    store_sketches: called when no kernel reads the sketches' old values any more.
    """
    program = Program(device)
    elements = [step for step in steps if step.is_elements]
    rows = [step for step in steps if not step.is_elements]
    covers = [step for step in rows if step.kind == SecondKind.COVER]
    _make_maxima(program, covers)
    _bring_up_to_date(program, [step for step in rows if step.kind != SecondKind.COVER])
    by_kernel = {"flat": [], "rows": [], "cover": [], "factored": [], "sketched": []}
    for step in rows:
        by_kernel[_kernel(step)].append(step)
    for name, of_kernel in by_kernel.items():
        program.add(f"step_{name}", of_kernel, _tiles, is_typed=True)
    program.add("cover_store", covers, _rows_and_columns)
    _step_elements(program, elements)
    program.call(store_sketches)
    program.run()


def run_observation(step: DeviceStep, device: torch.device) -> None:
    """Feed a second moment that is no sketch."""
    program = Program(device)
    if step.kind == SecondKind.FULL:
        program.add("observe_flat", [step], _tiles, is_typed=True)
    _bring_up_to_date(program, [step])
    program.run()


def find_wrong_positions(steps: Steps, device: torch.device) -> int | None:
    """See ops.find_wrong_positions."""
    sparse = [number for number, step in enumerate(steps) if not step.is_dense]
    program = Program(device)
    chosen = [steps[number] for number in sparse]
    found = program.give(chosen, torch.int32, zeros=True, is_wrong=_one)
    program.add("find_wrong_positions", chosen, _items)
    program.run()
    return next((number for number, is_wrong in zip(sparse, found.tolist(), strict=True)
                 if is_wrong), None)  # fmt: skip


def _kernel(step: DeviceStep) -> str:
    if step.is_sketched or step.is_flat:
        return "flat" if step.is_flat else "sketched"
    return {SecondKind.COVER: "cover", SecondKind.FACTORED: "factored"}.get(step.kind, "rows")


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
