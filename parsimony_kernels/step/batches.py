"""Steps of many tensors on a GPU together: each kernel is launched once for all that it is for.

Shapes: n rows of m columns make a parameter; k rows or elements of its gradient arrive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parsimony_kernels.runtime.launch import THREADS
from parsimony_kernels.runtime.operands import SecondKind
from parsimony_kernels.step import feeding
from parsimony_kernels.step.arguments import DeviceStep, Feeding
from parsimony_kernels.step.program import Program

_STORED_TOGETHER = 32  # factored means that one block brings up to date

Steps = Sequence[DeviceStep]


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


def run_steps(steps: Steps, device: torch.device, feedings: Sequence[Feeding] = ()) -> Program:
    """Make these steps. feedings: of their sketches.

    Returns: the program, to be run again for dense gradients, if there are no sketches.
    """
    program = Program(steps, device)
    feeding.feed(program, feedings)
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
    feeding.store(program, feedings)
    program.run()
    return program


def run_observations(steps: Steps, device: torch.device) -> Program:
    """Feed second moments that are no sketches; return the program, which can be run again."""
    program = Program(steps, device)
    full = [step for step in steps if step.kind == SecondKind.FULL]
    program.add("observe_flat", full, _tiles, is_typed=True)
    _bring_up_to_date(program, steps)
    program.run()
    return program


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
