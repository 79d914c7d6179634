"""The exchange: gradients in as they come, what the ranks agreed on out, or nothing of a bad step.

Owns: the order in which buckets leave, their way from one collective to the next (protocols.py says
which those are), and the verdict: a step in which any rank's gradient was infinite or NaN is undone
on all, to the bit.
Shapes: N elements of one flattened tensor, or of this rank's slice of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Comm, Group
from dgc.compression import Compression
from dgc.exchange import protocols
from dgc.exchange.handover import take_over
from dgc.exchange.kept import Kept
from dgc.exchange.lanes import Lanes
from dgc.exchange.progress import Travelling
from dgc.exchange.question import Question, answer_together, of_floats, to_floats
from dgc.exchange.route import Route
from dgc.exchange.sharing import Sharing
from dgc.exchange.step import Given, Step
from dgc.exchange.update import Update
from dgc.wire.buckets import Bucket, make_buckets, move_to_rows
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.statistics import Statistics
from dgc.worker.stats import StepStats
from parsimony_kernels.runtime.kinds import by_kind


class Exchange:
    """One worker's side of the exchange.

    A step is: `add` for every gradient of every tensor, `complete` for every tensor, in any order,
    `finish`, then `end_step`. A bucket leaves when its last tensor is complete and all buckets
    before it have left; the last one leaves in `finish`, so that until then a rank can make all
    ranks undo the step (`spoil`).

    islands: (island, bridge) of this rank in two levels, None in one; see Route.
    """

    def __init__(
        self,
        comm: Comm,
        compression: Compression,
        compensation: Compensation,
        statistics: Statistics,
        islands: tuple[Group, Group] | None = None,
    ) -> None:
        island, group = islands or (None, comm)
        self.route = Route(comm, group, island, comm.unique_name("exchange"))
        self.kept = Kept(compression, compensation, statistics, self.route.slice_index)
        self.buckets: list[Bucket] = []
        self.stats = StepStats()  # of the step under way, or of the last one
        self.before_step: Callable[[], None] = lambda: None  # called with a step's first gradient
        self._bucket_of: dict[str, Bucket] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._returned: set[str] = set()
        self._is_provisional = False  # a step is finished that can still be undone
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._step, self._lanes = Step(self.kept), Lanes()
        self._seen: set[str] = set()
        self._completed: set[str] = set()
        self._under_way: list[Travelling] = []
        self._num_started = 0
        self._num_complete = 0  # tensors of the next bucket before the first that is not
        self._first_start: float | None = None

    # ---- buckets ---------------------------------------------------------------------------------

    def lay_out(
        self, specs: Sequence[TensorSpec], density: float, bucket_bytes: int | None
    ) -> None:
        """Lay out the buckets for a density; see `make_buckets`.

        Between steps only; on all ranks alike.
        specs: numel is that of this rank's slice (`Route.slice_numel`).
        """
        if self.is_under_way:
            raise RuntimeError("the density can change only between steps; finish this one first")
        compression, size = self.kept.compression, self.route.group.world_size
        buckets = make_buckets(specs, compression, density, size, bucket_bytes)
        self._use(buckets, {spec.name: spec for spec in specs})

    def take_as_rows(self, row_specs: Sequence[TensorSpec]) -> None:
        """Send these tensors as rows from this step on, in which nothing of them was added yet.

        On all ranks alike, at the end of a step's backward: the buckets that they leave cannot have
        left on any rank.
        """
        for spec in row_specs:
            self.kept.statistics.remove(spec.name)
        compression, size = self.kept.compression, self.route.group.world_size
        buckets = move_to_rows(self.buckets, row_specs, compression, size)
        self._use(buckets, self._specs | {spec.name: spec for spec in row_specs})

    def _use(self, buckets: list[Bucket], specs: dict[str, TensorSpec]) -> None:
        self.buckets, self._specs = buckets, specs
        self._num_complete = 0
        for bucket in buckets:
            if bucket.is_sparse:
                names = (spec.name for spec in bucket.specs)
                self.kept.thresholds.follow(dict(zip(names, bucket.plans, strict=True)))
        self._bucket_of = {spec.name: bucket for bucket in buckets for spec in bucket.specs}
        self._returned = {name for name, spec in specs.items() if self._is_returned(spec)}

    def _is_returned(self, spec: TensorSpec) -> bool:
        is_scaled = spec.compressible and self.kept.compression.update_scale != 1
        is_divided = spec.name in self.kept.statistics.preconditioners
        return not (is_scaled or is_divided or self._bucket_of[spec.name].is_sparse)

    @property
    def order(self) -> list[str]:
        """The tensors in the order by which buckets are made."""
        return list(self._specs)

    def returns_gradients(self, name: str) -> bool:
        """Tell whether what arrives for a tensor is the mean of the ranks' gradients in this step,
        neither accumulated nor divided or scaled."""
        if self.kept.compensation.momentum:
            return self._specs[name].row_size > 0
        return name in self._returned

    # ---- in --------------------------------------------------------------------------------------

    @property
    def is_under_way(self) -> bool:
        return bool(self._seen)

    @property
    def num_started(self) -> int:
        """The buckets of this step that have left."""
        return self._num_started

    def incomplete_names(self) -> list[str]:
        """Return the names of the tensors that are not complete in this step."""
        return [name for name in self._bucket_of if name not in self._completed]

    def add(
        self,
        name: str,
        grad_N: Tensor,
        scale: Tensor | None = None,
        num_parts: int = 1,
        is_last: bool = True,
        may_keep: bool = False,
    ) -> None:
        """Take one of the `num_parts` gradients of a tensor in this step, times scale (1,).

        grad_N: float32, bfloat16 or float16; of a float64 tensor float64, as the scale is then.
        is_last: no other follows in this step; entries are then selected in the same pass.
        may_keep: the gradient's memory is ours from now on.
        """
        self._begin(name)
        step, given = self._step, Given(name, grad_N, scale, num_parts, is_last, may_keep)
        with step.stats.timed("compensate"), self._lanes.on(grad_N.device, grad_N, scale):
            if self.route.island is None:
                step.add(self._bucket_of[name], given)
            else:
                step.hold(given)

    def add_rows(self, name: str, grad: Tensor, scale: Tensor | None = None) -> None:
        """Take a row-sparse gradient, a sparse tensor, times scale (1,); rows may repeat."""
        self._begin(name)
        with self._lanes.on(grad.device, grad._indices(), grad._values(), scale):
            self._step.rows.add(name, grad, scale)

    def complete(self, name: str, rests: bool = False) -> None:
        """Take no more gradients of a tensor in this step; start what can now be sent.

        A tensor without a gradient counts as zero, unless it rests: what this rank keeps of it then
        stays as it is, and if it rests on all ranks there is no update for it.
        """
        if name in self._completed:
            raise RuntimeError(f"{name} has already given its gradient in this step")
        spec = self._specs[name]
        if name not in self._seen and (rests or spec.row_size):
            self._begin(name)
            if rests:
                self._step.resting.add(name)
        elif name not in self._seen:
            zeros = torch.zeros(spec.whole, dtype=spec.dtype, device=spec.device)
            self.add(name, zeros, may_keep=True)
        self._completed.add(name)
        self._start_ready_buckets(len(self.buckets) - 1)

    def drop(self, name: str) -> bool:
        """Forget a tensor's gradients in this step; do nothing, and return False, if it left."""
        if self._bucket_of[name] in self.buckets[: self._num_started]:
            return False
        self._lanes.move_here()
        self._step.drop(name)
        self._num_complete = 0
        self._seen.discard(name)
        self._completed.discard(name)
        return True

    def spoil(self) -> None:
        """Make all ranks undo the step under way, whatever the gradients were. Before `finish`."""
        waiting = self.buckets[self._num_started :]
        self._step.spoilt.update(spec.name for bucket in waiting for spec in bucket.specs)

    def _begin(self, name: str) -> None:
        if not self.is_under_way:
            self.end_step(stands=True)
            self.before_step()
            self.stats = self._step.stats
        self._seen.add(name)

    # ---- on the way ------------------------------------------------------------------------------

    def _start_ready_buckets(self, end: int) -> None:
        for bucket in self.buckets[self._num_started : end]:
            if not self._is_complete(bucket):
                break
            self._num_started, self._num_complete = self._num_started + 1, 0
            way = protocols.run(self.route, self._step, bucket)
            self._under_way.append(Travelling(way, self._lanes, bucket.specs[0].device))
            self._first_start = self._first_start or time.perf_counter()
        self._go_on()

    def _is_complete(self, bucket: Bucket) -> bool:
        """Tell whether all tensors of the next bucket to leave are complete; each is asked once."""
        specs = bucket.specs[self._num_complete :]
        self._num_complete += sum(
            1 for _ in takewhile(lambda spec: spec.name in self._completed, specs)
        )
        return self._num_complete == len(bucket.specs)

    def _go_on(self) -> bool:
        """Take buckets whose collective is done to their next; tell whether there were any."""
        ready = [t for t in self._under_way if t.handle is not None and t.handle.poll()]
        for travelling in ready:
            travelling.go_on()
        return bool(ready)

    def finish(self) -> Update | None:
        """Wait for all buckets and return what to apply; None if the step was undone."""
        self._lanes.move_here()
        self._start_ready_buckets(len(self.buckets))
        step, is_one_level = self._step, self.route.island is None
        # In two levels statistics are shared when all buckets have arrived: until the means of its
        # island have replaced them, a rank's statistics differ from those of its island.
        sharing = Sharing(self.route, step) if is_one_level else None
        while waiting := [t for t in self._under_way if t.handle is not None]:
            if not self._go_on():
                with step.stats.timed("wait"):
                    self._wait_for(waiting)
        self._answer(())  # cuts that came up since
        update = Update()
        for travelling in self._under_way:
            update.take_in(travelling.update)
        sharing = sharing or Sharing(self.route, step)
        sharing.finish(is_bad=bool(update.bad))
        if self._first_start is not None:
            step.stats.in_flight_seconds = time.perf_counter() - self._first_start
        self._is_provisional = True
        if update.bad:
            step.stats.skipped = ", ".join(update.bad)
            self.end_step(stands=False)
        self._begin_anew()
        return None if update.bad else update

    def _wait_for(self, waiting: Sequence[Travelling]) -> None:
        """Wait for one of these; for the last questions of all when there is nothing else."""
        others = [t for t in waiting if not t.is_asking_last]
        if others:
            others[0].arrive()
        else:
            self._answer([t.handle for t in waiting])

    def _answer(self, questions: Sequence[Question]) -> None:
        """Answer the buckets' last questions, and with them what thresholds are to know."""
        thresholds = self.kept.thresholds
        open_cuts = by_kind(thresholds.open_cuts())
        of_cuts = [
            Question([of_floats(torch.stack(list(cuts.values())))], is_last=True)
            for cuts in open_cuts
        ]
        answer_together([*questions, *of_cuts])
        for cuts, question in zip(open_cuts, of_cuts, strict=True):
            thresholds.tell_cuts(dict(zip(cuts, to_floats(*question.wait()), strict=True)))

    def end_step(self, stands: bool) -> None:
        """Make the finished step final if it stands; else undo it, to the bit. On all ranks alike.

        Nothing is done where there is no finished step that is not yet final.
        """
        if self._is_provisional:
            self._is_provisional = False
            self.kept.end_step(stands)

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, velocities, statistics and thresholds; not the replica's.

        order, rows: the names by which buckets are made, and those of tensors that travel as rows;
        with them a resumed run repeats the same sums. share: this rank's slice, and how many there
        are.
        """
        self.end_step(stands=True)
        return {
            "order": self.order,
            "rows": [name for name, spec in self._specs.items() if spec.row_size],
            "share": torch.tensor(self._slice, dtype=torch.int64, device="cpu"),
            **self.kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; tensors that it does not know stay as they are.

        Raises: ValueError, before anything changes, for the state of another slice, or of tensors
            that are not here."""
        self._check_between_steps()
        if not self.is_of_here(state):
            raise ValueError(
                f"the state is of slice (number, of how many) {_slice_of(state)} of every tensor; "
                f"allowed: {self._slice}, as ranks are placed here. Start them on the nodes as "
                f"before, or give all workers' states to load_worker_states"
            )
        self.kept.load_state_dict(state, self._specs)

    def is_of_here(self, state: Mapping[str, Any]) -> bool:
        """Tell whether a worker of this rank's place has made the state: of the same slice."""
        return _slice_of(state) == self._slice

    def take_over(self, states: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
        """Go on with a share of what the workers of another job kept; see handover.take_over."""
        self._check_between_steps()
        return take_over(self.kept, self.route, self._specs, states)

    @property
    def _slice(self) -> tuple[int, int]:
        return self.route.slice_index, self.route.num_slices

    def _check_between_steps(self) -> None:
        if self.is_under_way:
            raise RuntimeError("a state can be loaded only between steps; finish this one first")
        self.end_step(stands=True)


def _slice_of(state: Mapping[str, Any]) -> tuple[int, int]:
    return tuple(state["share"].tolist() if "share" in state else (0, 1))
