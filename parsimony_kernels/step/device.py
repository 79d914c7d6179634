"""The operations in CUDA: the arguments of device.cu's kernels, and their launches in order.

ops.py has checked what is given. Work goes to torch's current stream of the tensors' device, and
nothing here waits for it. Tensors that are stepped together share launches (see batches.py), except
for those that feed sketches. Temporaries: for rows, n + m numbers (Cover) or a 32nd of the
parameter (Factored; more where it is small); for a sketch, a few numbers for each arriving row and
new values of the buckets that change; for elements, a few numbers each.

Shapes: n rows of m columns make the parameter; k rows or elements of it arrive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.runtime.launch import THREADS, launch
from parsimony_kernels.runtime.operands import First, Rule, Second, Sketch, Table
from parsimony_kernels.step.arguments import DeviceStep, Feeding, Inserted, Items, Tiling
from parsimony_kernels.step.batches import (
    MAX_BLOCKS,
    Program,
    find_wrong_positions,
    run_observation,
    run_steps,
)

_NO_RULE = Rule(lr=0.0)


def _launch(name: str, work: Feeding, device: torch.device, flat: int | None = None) -> None:
    """Launch over `flat` items, or over the tiles."""
    blocks = work.tiling.num_tiles if flat is None else -(-flat // THREADS)
    launch(name, max(1, min(blocks, MAX_BLOCKS)), work, device)


# ---- sketches ------------------------------------------------------------------------------------


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    dim = table.values.shape[2]
    estimates = table.values.new_empty(len(rows), dim)
    if estimates.numel() > 0:
        items = Items(num_items=len(rows), dim=dim, positions=rows.data_ptr())
        query = Feeding(items=items, tiling=Tiling(len(rows), dim), sketch=Sketch.of(table))
        query.point(estimates=estimates)
        _launch("sketch_query", query, rows.device)
    return estimates


def sketch_query_elements(table: Table, indices: Tensor) -> Tensor:
    estimates = table.values.new_empty(len(indices))
    if len(indices):
        items = Items(len(indices), dim=table.values.shape[2], is_elements=True)
        items.positions = indices.data_ptr()
        query = Feeding(items=items, sketch=Sketch.of(table))
        query.point(estimates=estimates)
        _launch("sketch_query_elements", query, indices.device, flat=len(indices))
    return estimates


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, gain: float, forgetting: float
) -> None:
    items = Items(num_items=len(rows), dim=values.shape[1])
    items.positions, items.grad = rows.data_ptr(), values.data_ptr()
    scalars = {"gain": gain, "forgetting": forgetting, "keep": 1.0}
    feeding = Feeding(rule=_NO_RULE, items=items, inserted=Inserted.VALUES, **scalars)
    _feed(table, feeding, "sketch_update_f32")


def _feed(table: Table, feeding: Feeding, kernel: str, *, is_stored: bool = True) -> None:
    """Insert what `feeding` describes; see sketch_update in device.cu.

    Unless `is_stored`, the table stays as it was until sketch_store is launched.
    """
    depth, width, dim = table.values.shape
    device, items = table.values.device, feeding.items
    num_columns = 1 if items.is_elements else dim
    num_entries = depth * items.num_items
    if num_entries * num_columns == 0:
        return
    feeding.sketch, feeding.tiling = Sketch.of(table), Tiling(num_entries, num_columns)
    feeding.point(cells=torch.empty(num_entries, dtype=torch.int64, device=device))
    _launch("sketch_cells", feeding, device, flat=num_entries)
    cells, order = feeding.kept["cells"].sort(stable=True)
    feeding.point(cells=cells, order=order)
    if is_stored and not feeding.forgetting:
        _launch(kernel, feeding, device)
        return
    is_first = torch.ones_like(cells, dtype=torch.bool)
    torch.ne(cells[1:], cells[:-1], out=is_first[1:])
    most = min(num_entries, depth * width * dim // num_columns)
    feeding.point(ranks=is_first.cumsum(0), fresh=table.values.new_empty(most, num_columns))
    _launch(kernel, feeding, device)
    if is_stored:
        _launch("sketch_store", feeding, device)


def _feed_moments(work: DeviceStep, first: First, second: Second) -> list[Feeding]:
    """Feed the gradient to the moments that are sketches, before the parameter moves.

    Returns: the feedings, to be stored after the step, which reads the old values.
    """
    rule, kernel, feedings = work.rule, f"sketch_update_{work.dtype}", []
    if isinstance(second, Table):
        scalars = {"gain": rule.second_gain, "forgetting": rule.second_forgetting, "keep": 1.0}
        feedings.append(Feeding(rule, work.items, inserted=Inserted.SQUARE, **scalars))
        _feed(second, feedings[-1], kernel, is_stored=False)
    if isinstance(first, Table):
        scalars = {"gain": rule.first_gain, "forgetting": rule.first_forgetting, "keep": 1.0}
        if work.is_whole:  # the whole table is scaled instead
            scalars |= {"forgetting": 0.0, "keep": rule.first_beta}
        feedings.append(Feeding(rule, work.items, inserted=Inserted.GRADIENT, **scalars))
        _feed(first, feedings[-1], kernel, is_stored=False)
    return feedings


# ---- steps ---------------------------------------------------------------------------------------


class PlannedStep:
    """A step that is kept: see ops.PlannedStep."""

    def __init__(self, param: Tensor, first: First, second: Second, num_steps: Tensor) -> None:
        self.work, self.moments = DeviceStep(param, first, second), (first, second)
        self._num_steps = ctypes.c_float.from_address(num_steps.data_ptr())
        self.device = param.device
        self.last: tuple[list[PlannedStep], Program] | None = None  # that this step came first in

    @property
    def num_steps(self) -> int:
        return int(self._num_steps.value)

    def set(
        self,
        rule: Rule,
        values: Tensor,
        rows: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        self.rule, self.values, self.rows, self.indices = rule, values, rows, indices

    @staticmethod
    def find_wrong_positions(steps: Sequence[PlannedStep]) -> int | None:
        _take(steps)
        return find_wrong_positions([step.work for step in steps], steps[0].device)

    @staticmethod
    def run(steps: Sequence[PlannedStep]) -> None:
        try:
            _run_planned(steps)
            for step in steps:
                step._num_steps.value += 1
        finally:
            for step in steps:  # nobody keeps gradients longer than the step
                step.values = step.rows = step.indices = None


def _run_planned(steps: Sequence[PlannedStep]) -> None:
    is_dense = all(step.rows is None and step.indices is None for step in steps)
    last = steps[0].last
    if is_dense and last is not None and last[0] == steps:
        last[1].run_again([step.rule for step in steps], [step.values for step in steps])
        return
    _take(steps)
    program = _run([(step.work, *step.moments) for step in steps], steps[0].device)
    is_plain = is_dense and not any(step.work.is_sketched for step in steps)
    steps[0].last = (list(steps), program) if is_plain else None


def _take(steps: Sequence[PlannedStep]) -> None:
    for step in steps:
        step.work.take(step.rule, step.values, step.rows, step.indices)


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    work = DeviceStep(param, first, second)
    work.take(rule, grad, rows=rows)
    _run([(work, first, second)], param.device)


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    work = DeviceStep(param, first, second)
    work.take(rule, values, indices=indices)
    _run([(work, first, second)], param.device)


def observe(grad: Tensor, rule: Rule, second: Second, scale: Tensor | None) -> None:
    scalars = ("second_beta", "second_gain", "second_forgetting")
    rule = Rule(lr=0.0, **{name: getattr(rule, name) for name in scalars})
    # Without weight decay no parameter is read; grad takes its place.
    work = DeviceStep(grad, None, second)
    work.take(rule, grad)
    if scale is not None:
        work.items.scale = scale.data_ptr()
    if isinstance(second, Table):
        _store(_feed_moments(work, None, second), grad.device)
    else:
        run_observation(work, grad.device)


def _run(steps: list[tuple[DeviceStep, First, Second]], device: torch.device) -> Program:
    """Make these steps; return the program of those without a sketch.

    Steps with sketches are made one by one, so that the new values of just one sketch wait to be
    stored: together they would be as large as all sketches.
    """
    steps = [each for each in steps if each[0].num_items]
    for work, first, second in steps:
        if work.is_sketched:
            feedings = _feed_moments(work, first, second)
            run_steps([work], device)
            _store(feedings, device)
    return run_steps([work for work, *_ in steps if not work.is_sketched], device)


def _store(feedings: Sequence[Feeding], device: torch.device) -> None:
    for feeding in feedings:
        _launch("sketch_store", feeding, device)
