"""The operations in CUDA: the arguments of device.cu's kernels, and their launches in order.

ops.py has checked what is given. Work goes to torch's current stream of the tensors' device, and
nothing here waits for it. Tensors that are stepped together share launches: see batches.py, and for
sketches feeding.py. Temporaries: for rows, n + m numbers (Cover) or a 32nd of the
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
from parsimony_kernels.runtime.launches import MAX_BLOCKS
from parsimony_kernels.runtime.operands import Factored, First, Rule, Second, Sketch, Table
from parsimony_kernels.runtime.transfer import upload_bytes
from parsimony_kernels.step import feeding
from parsimony_kernels.step.arguments import DeviceStep, Feeding, Inserted, Items, Query, Tiling
from parsimony_kernels.step.batches import find_wrong_positions, run_observations, run_steps
from parsimony_kernels.step.observing import Observation
from parsimony_kernels.step.program import Program
from parsimony_kernels.step.roots import Root, Rootings, rootings

_NO_RULE = Rule(lr=0.0)


# ---- sketches ------------------------------------------------------------------------------------


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    sketch_update(table, rows, values, 1.0, 0.0)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    dim = table.values.shape[2]
    estimates = table.values.new_empty(len(rows), dim)
    if estimates.numel() > 0:
        items = Items(num_items=len(rows), dim=dim, positions=rows.data_ptr())
        query = Query(items, Tiling(len(rows), dim), Sketch.of(table), estimates.data_ptr())
        launch("sketch_query", min(query.tiling.num_tiles, MAX_BLOCKS), query, rows.device)
    return estimates


def sketch_query_elements(table: Table, indices: Tensor) -> Tensor:
    estimates = table.values.new_empty(len(indices))
    if len(indices):
        items = Items(len(indices), dim=table.values.shape[2], is_elements=True)
        items.positions = indices.data_ptr()
        query = Query(items, Tiling(0, 0), Sketch.of(table), estimates.data_ptr())
        num_blocks = min(-(-len(indices) // THREADS), MAX_BLOCKS)
        launch("sketch_query_elements", num_blocks, query, indices.device)
    return estimates


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, gain: float, forgetting: float
) -> None:
    items = Items(num_items=len(rows), dim=values.shape[1])
    items.positions, items.grad = rows.data_ptr(), values.data_ptr()
    given = Feeding(table, items, "f32", Inserted.VALUES, _NO_RULE, gain, forgetting, 1.0)
    _feed([given], rows.device, is_read_again=False)


def _feed(feedings: Sequence[Feeding], device: torch.device, *, is_read_again: bool) -> None:
    program = Program((), device)
    feeding.feed(program, feedings, is_read_again=is_read_again)
    feeding.store(program, feedings)
    program.run()


# ---- steps ---------------------------------------------------------------------------------------


class PlannedStep:
    """A step that is kept: see ops.PlannedStep."""

    def __init__(self, param: Tensor, first: First, second: Second, num_steps: Tensor) -> None:
        self.work, self.moments = DeviceStep(param, first, second), (first, second)
        self._num_steps = ctypes.c_float.from_address(num_steps.data_ptr())
        self.device = param.device
        self.last: Program | None = None  # of dense gradients, in which this step came first

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
    dense = [step for step in steps if step.rows is None and step.indices is None]
    sparse = [step for step in steps if step.rows is not None or step.indices is not None]
    if sparse:
        _take(sparse)
        _run([(step.work, *step.moments) for step in sparse], sparse[0].device)
    if dense:
        _run_dense(dense)


def _run_dense(steps: Sequence[PlannedStep]) -> None:
    """Make these steps, with the program of the step before if it was for the same."""
    last, works = steps[0].last, [step.work for step in steps]
    if last is not None and last.steps == works:
        last.run_again([step.rule for step in steps], [step.values for step in steps])
        return
    _take(steps)
    # Kept by one of the steps, so it must not refer to them: their tensors would outlive them.
    steps[0].last = _run([(step.work, *step.moments) for step in steps], steps[0].device)


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


def observe(given: Sequence[Observation]) -> None:
    for one in given:
        if isinstance(one.observed.second, Table):
            (work,) = _works([one])
            _take_in(work, one)
            feedings = feeding.feedings_of(work, None, one.observed.second)
            _feed(feedings, one.grad.device, is_read_again=False)
    others = [one for one in given if not isinstance(one.observed.second, Table)]
    if not others:
        return
    works, last = _works(others), others[0].observed.program
    if last is not None and last.steps == works:
        last.run_again([_alone(one.rule) for one in others], [one.grad for one in others],
                       [one.scale for one in others])  # fmt: skip
        return
    for work, one in zip(works, others, strict=True):
        _take_in(work, one)
    others[0].observed.program = run_observations(works, others[0].grad.device)


def _works(given: Sequence[Observation]) -> list[DeviceStep]:
    """Return what each moment's kernels are given, which is kept as long as gradients are alike."""
    found = []
    for one in given:
        kind = one.grad.dtype, one.grad.shape
        if one.observed.kind != kind:
            # Without weight decay no parameter is read; grad takes its place.
            one.observed.work = DeviceStep(one.grad, None, one.observed.second)
            one.observed.kind = kind
        found.append(one.observed.work)
    return found


def _alone(rule: Rule) -> Rule:
    """Return a rule of the second moment alone."""
    copy = Rule.from_buffer_copy(rule)
    copy.sign, copy.weight_decay = 1.0, 0.0
    return copy


def _take_in(work: DeviceStep, one: Observation) -> None:
    work.take(_alone(one.rule), one.grad)
    work.items.scale = None if one.scale is None else one.scale.data_ptr()


def roots(asked: Sequence[Root], positions_K: Tensor) -> Tensor:
    device = positions_K.device
    found = torch.empty(positions_K.shape, dtype=torch.float32, device=device)
    means = torch.empty(len(asked), dtype=torch.float32, device=device)
    there = upload_bytes(rootings(asked, means.data_ptr()), device=device)
    given = Rootings(there.data_ptr(), len(asked), positions_K.data_ptr(), found.data_ptr())
    if any(isinstance(root.second, Factored) for root in asked):
        launch("root_means", len(asked), given, device)
    launch("roots_at", min(-(-positions_K.numel() // THREADS), MAX_BLOCKS), given, device)
    return found


def sqrt_(x: Tensor) -> Tensor:
    return x.sqrt_()  # which CUDA rounds to the nearest


def _run(steps: list[tuple[DeviceStep, First, Second]], device: torch.device) -> Program | None:
    """Make these steps; return the program that did, if it can be run again."""
    steps = [each for each in steps if each[0].num_items]
    plain = [work for work, *_ in steps if not work.is_sketched]
    sketched = [each for each in steps if each[0].is_sketched]
    if not sketched:
        return run_steps(plain, device)
    for works, feedings in feeding.together(sketched):
        run_steps([*plain, *works], device, feedings)
        plain = []
    return None
