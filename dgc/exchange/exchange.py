"""The exchange: gradients in as they come, what the ranks agreed on out, or nothing of a bad step.

Owns: the order in which buckets leave, their way from one collective to the next (protocols.py is
what the way is), and the verdict: a step in which any rank's gradient was infinite or NaN is undone
on all, to the bit.
Shapes: N elements of one flattened tensor, or of this rank's share of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgc.comm.interface import Comm, Group, Handle
from dgc.compression import Compression
from dgc.exchange import protocols
from dgc.exchange.outgoing import Outgoing, Outlet
from dgc.exchange.progress import Travelling
from dgc.exchange.protocols import Update
from dgc.wire.buckets import Bucket, TensorSpec, move_to_rows, plan_buckets
from dgc.worker.magnitudes import Magnitudes, overflown
from dgc.worker.residual import Compensation
from dgc.worker.rows import RowGradients
from dgc.worker.scaling import scaled
from dgc.worker.statistics import Statistics, divide
from dgc.worker.stats import StepStats
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.runtime.operands import Found, Report


class Exchange:
    """One worker's side of the exchange.

    A step is: `add` for every gradient of every tensor, `close` for every tensor, in any order,
    `finish`, then `commit` or `roll_back`. A bucket leaves when its last tensor is closed and all
    buckets before it have left; the last one leaves in `finish`, so that until then a rank can make
    all ranks undo the step (`spoil`).

    island: the ranks with whom gradients are summed densely first; None in one level. group: those
    with whom sums, or gradients, are exchanged: all ranks, or those in the same place of the other
    islands. place, num_shares: which share of every tensor is this rank's affair, of how many.
    """

    def __init__(
        self,
        comm: Comm,
        compression: Compression,
        compensation: Compensation,
        statistics: Statistics,
        islands: tuple[Group, Group] | None = None,
    ) -> None:
        self.comm, self.compression = comm, compression
        self.compensation, self.statistics = compensation, statistics
        self.island, self.group = islands or (None, comm)
        self.place, self.num_shares = 0, 1
        if self.island is not None:
            self.place, self.num_shares = self.island.rank, self.island.world_size
        self.outlet = Outlet(compression, compensation, statistics, self.place)
        self.buckets: list[Bucket] = []
        self.stats = StepStats()
        self.before_step: Callable[[], None] = lambda: None  # called with a step's first gradient
        self._scope = comm.unique_name("exchange")  # two optimizers' buckets must not be confused
        self._bucket_of: dict[str, Bucket] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._returned: set[str] = set()
        self._is_provisional = False  # a step is finished that can still be rolled back
        self._reset()

    def plan(self, specs: Sequence[TensorSpec], density: float, bucket_bytes: int) -> None:
        """Lay out the buckets for a density. Between steps only; on all ranks alike.

        specs: numel is that of this rank's share (`share_numel`).
        """
        if self.is_under_way:
            raise RuntimeError("the density can change only between steps; finish this one first")
        self._lay_out(
            plan_buckets(specs, self.compression, density, self.group.world_size, bucket_bytes),
            {spec.name: spec for spec in specs},
        )

    def take_as_rows(self, row_specs: Sequence[TensorSpec]) -> None:
        """Send these tensors as rows from this step on, in which nothing of them was added yet.

        On all ranks alike, at the end of a step's backward: the buckets that they leave cannot have
        left on any rank.
        """
        for spec in row_specs:
            self.statistics.remove(spec.name)
        buckets = move_to_rows(self.buckets, row_specs, self.compression, self.group.world_size)
        self._lay_out(buckets, self._specs | {spec.name: spec for spec in row_specs})

    def _lay_out(self, buckets: list[Bucket], specs: dict[str, TensorSpec]) -> None:
        self.buckets, self._specs = buckets, specs
        self.outlet.plan(buckets)
        self._bucket_of = {spec.name: bucket for bucket in buckets for spec in bucket.specs}
        self._returned = {name for name, spec in specs.items() if self._is_returned(spec)}

    @property
    def order(self) -> list[str]:
        """The tensors in the order by which buckets are made."""
        return list(self._specs)

    def share_numel(self, whole: int) -> int:
        """Return the elements of a tensor whose exchange is this rank's affair, with padding."""
        return -(-whole // self.num_shares)

    @property
    def is_under_way(self) -> bool:
        return bool(self._seen)

    # ---- in --------------------------------------------------------------------------------------

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
        with self.stats.timed("compensate"):
            self.statistics.observe(name, grad_N, scale, num_parts)
            if self.compression.preconditioning == "early":
                grad_N, scale, may_keep = self._divide_early(name, grad_N, scale), None, False
            if self.island is None:
                self.accumulate(name, grad_N, scale, is_last, may_keep)
            else:
                self._hold(name, grad_N, scale, may_keep)

    def add_rows(self, name: str, grad: Tensor, scale: Tensor | None = None) -> None:
        """Take a row-sparse gradient, a sparse tensor, times scale (1,); rows may repeat."""
        self._begin(name)
        self.rows.add(name, grad, scale)

    def close(self, name: str, rests: bool = False) -> None:
        """Take no more gradients of a tensor in this step; start what can now be sent.

        A tensor without a gradient counts as zero, unless it rests: what this rank keeps of it then
        stays as it is, and if it rests on all ranks there is no update for it.
        """
        if name in self._closed:
            raise RuntimeError(f"{name} has already given its gradient in this step")
        spec = self._specs[name]
        if name not in self._seen and (rests or spec.row_size):
            self._begin(name)
            if rests:
                self.resting.add(name)
        elif name not in self._seen:
            self.add(name, torch.zeros(spec.whole, dtype=spec.dtype, device=spec.device))
        self._closed.add(name)
        self._start_ready_buckets(len(self.buckets) - 1)

    def wake_all_but(self, bucket: Bucket, resting: set[str]) -> None:
        """Let tensors that rest here, but not on all ranks of the island, count as zero."""
        for spec in bucket.specs:
            if spec.name in self.resting - resting:
                self.resting.discard(spec.name)
                none = torch.zeros(spec.whole, dtype=spec.dtype, device=spec.device)
                self.statistics.observe(spec.name, none, None, 1)

    def drop(self, name: str) -> bool:
        """Forget a tensor's gradients in this step; do nothing, and return False, if it left."""
        if self._bucket_of[name] in self.buckets[: self._num_started]:
            return False
        for kept in (self.compensation, self.statistics, self.magnitudes, self.rows):
            kept.drop(name)
        for found in (self._founds, self._held):
            found.pop(name, None)
        for names in (self._seen, self._closed, self._is_selected):
            names.discard(name)
        return True

    def spoil(self) -> None:
        """Make all ranks undo the step under way, whatever the gradients were. Before `finish`."""
        self.spoilt.update(
            spec.name for bucket in self.buckets[self._num_started :] for spec in bucket.specs
        )

    @property
    def num_started(self) -> int:
        """The buckets of this step that have left."""
        return self._num_started

    def returns_gradients(self, name: str) -> bool:
        """Tell whether what arrives for a tensor is the mean of the ranks' gradients in this step,
        neither accumulated nor divided or scaled."""
        if self.compensation.momentum:
            return self._specs[name].row_size > 0
        return name in self._returned

    def open_names(self) -> list[str]:
        """Names of the tensors that are not closed in this step."""
        return [name for name in self._bucket_of if name not in self._closed]

    def accumulate(
        self,
        name: str,
        grad_N: Tensor,
        scale: Tensor | None = None,
        is_last: bool = True,
        may_keep: bool = False,
    ) -> None:
        """Add a gradient, or a share of an island's sum, to the residual; select if it is last."""
        bucket = self._bucket_of[name]
        selection = None
        if bucket.is_sparse and is_last and self.compression.select_by == "raw":
            selection = self.outlet.selectors[name].begin(self.compensation.num_steps)
            self._is_selected.add(name)
        found = self.compensation.accumulate(
            name, grad_N, scale=scale, is_sent_whole=not bucket.is_sparse, selection=selection,
            may_keep=may_keep,
        )  # fmt: skip
        self._founds[name] = found
        self.magnitudes.note(name, found.report[:1])

    def read(self, bucket: Bucket) -> tuple[list[Found | None], list[Report | None]]:
        """Return what the passes over a bucket's tensors found, None for one that rests. On a GPU
        this waits for them."""
        awake = [spec for spec in bucket.specs if spec.name not in self.resting]
        for spec in awake:
            is_open = bucket.is_sparse and spec.name not in self._is_selected
            if is_open and self.compression.select_by == "raw":
                selection = self.outlet.selectors[spec.name].begin(self.compensation.num_steps)
                if selection is not None:  # the last micro-batch had no gradient for this tensor
                    found = self.compensation.select_again(spec.name, selection)
                    self._founds[spec.name] = found
            self._founds[spec.name].report[:1] = self.magnitudes[spec.name]
        founds = [self._founds.pop(spec.name, None) for spec in bucket.specs]
        reports = iter(buffers.read_reports([f for f in founds if f is not None]) if awake else ())
        return founds, [None if found is None else next(reports) for found in founds]

    def bad_places(self, bucket: Bucket, reports: Sequence[Report | None]) -> set[int]:
        """Return the places of tensors because of which all ranks must undo the step."""
        spoilt = {n for n, spec in enumerate(bucket.specs) if spec.name in self.spoilt}
        return spoilt | overflown(reports, bucket.dtype)

    def note_selected(self, bucket: Bucket, outgoing: Outgoing) -> None:
        self.stats.num_selected += outgoing.positions_K.numel()
        self.stats.num_selectable += sum(spec.numel for spec in bucket.specs)
        for name, part in outgoing.taken:
            if part.values_K.numel():
                self.stats.least_taken[name] = part.values_K.abs().min()

    def release(self, name: str) -> Tensor:
        """Return, and forget, a tensor's gradient in this step."""
        return self._held.pop(name)

    def name_of(self, bucket: Bucket, stage: str = "") -> str:
        """Return the name of a bucket's collective; of one stage, if it has several."""
        return ".".join(part for part in (self._scope, bucket.name, stage) if part)

    def _is_returned(self, spec: TensorSpec) -> bool:
        is_scaled = spec.compressible and self.compression.update_scale != 1
        is_divided = spec.name in self.statistics.preconditioners
        return not (is_scaled or is_divided or self._bucket_of[spec.name].is_sparse)

    def _begin(self, name: str) -> None:
        if not self.is_under_way:
            self.commit()
            self.before_step()
            self.stats = StepStats(norm_of_residual=self.compensation.norm)
        self._seen.add(name)

    def _divide_early(self, name: str, grad_N: Tensor, scale: Tensor | None) -> Tensor:
        grad_N = scaled(grad_N, scale)
        self.magnitudes.note_gradient(name, grad_N)  # a quotient can hide an infinity
        root_N = self.statistics.root(name)
        return grad_N if root_N is None else divide(grad_N, root_N)

    def _hold(self, name: str, grad_N: Tensor, scale: Tensor | None, may_keep: bool) -> None:
        mine_N = scaled(grad_N, scale)
        if mine_N is grad_N and not may_keep:
            mine_N = grad_N.clone()
        self.magnitudes.note_gradient(
            name, mine_N
        )  # a sum can hide what spoilt this worker's statistic
        held_N = self._held.get(name)
        self._held[name] = mine_N if held_N is None else held_N.add_(mine_N)

    # ---- on the way ------------------------------------------------------------------------------

    def _start_ready_buckets(self, end: int) -> None:
        for bucket in self.buckets[self._num_started : end]:
            if not all(spec.name in self._closed for spec in bucket.specs):
                break
            self._num_started += 1
            self._under_way.append(Travelling(protocols.run(self, bucket)))
            self._first_start = self._first_start or time.perf_counter()
        self._go_on()

    def _go_on(self) -> bool:
        """Take buckets whose collective is done to their next; tell whether there were any."""
        ready = [t for t in self._under_way if t.handle is not None and t.handle.poll()]
        for travelling in ready:
            travelling.go_on()
        return bool(ready)

    def finish(self) -> Update | None:
        """Wait for all buckets and return what to apply; None if the step was undone."""
        self._start_ready_buckets(len(self.buckets))
        # An island's means replace its ranks' statistics whenever they arrive: till then what would
        # be shared is not the same on all ranks.
        sharing = self._start_sharing() if self.island is None else None
        while waiting := [t for t in self._under_way if t.handle is not None]:
            if not self._go_on():
                with self.stats.timed("wait"):
                    waiting[0].arrive()
        update = Update()
        for travelling in self._under_way:
            update.take_in(travelling.update)
        if self.island is not None:
            sharing = self._start_sharing()
        if sharing is not None:
            self._finish_sharing(*sharing, is_bad=bool(update.bad))
        if self._first_start is not None:
            self.stats.in_flight_seconds = time.perf_counter() - self._first_start
        self._is_provisional = True
        if update.bad:
            self.stats.skipped = ", ".join(update.bad)
            self.roll_back()
        self._reset()
        return None if update.bad else update

    def commit(self) -> None:
        """Make the finished step final, if there is one that is not."""
        if self._is_provisional:
            self._is_provisional = False
            for part in (self.compensation, self.statistics, self.outlet):
                part.commit()

    def roll_back(self) -> None:
        """Undo the finished step, to the bit. On all ranks alike."""
        if self._is_provisional:
            self._is_provisional = False
            for part in (self.compensation, self.statistics, self.outlet):
                part.roll_back()

    def _reset(self) -> None:
        self._seen: set[str] = set()
        self._closed: set[str] = set()
        self._is_selected: set[str] = set()
        self.resting: set[str] = set()
        self.spoilt: set[str] = set()
        self._founds: dict[str, Found] = {}
        self.magnitudes = Magnitudes()
        self._held: dict[str, Tensor] = {}
        self.rows = RowGradients()
        self._under_way: list[Travelling] = []
        self._num_started = 0
        self._first_start: float | None = None

    def _start_sharing(self) -> tuple[list[str], list[Handle]] | None:
        """Start to average those statistics whose turn it is; return their names."""
        names = self.statistics.due(self.compensation.num_steps)
        if not names:
            return None
        handles = []
        for flat in self.statistics.pack(names):
            self.stats.statistics_bytes += flat.nbytes
            name = f"{self._scope}.statistics.{len(handles)}"
            handles.append(self.comm.all_reduce_async(flat, name))
        return names, handles

    def _finish_sharing(self, names: list[str], handles: list[Handle], is_bad: bool) -> None:
        with self.stats.timed("wait"):
            means = [handle.wait().div_(self.comm.world_size) for handle in handles]
        if not is_bad:
            self.statistics.unpack(names, means)

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, velocities, statistics and thresholds; not the replica's.

        order, rows: the names by which buckets are made, and those of tensors that travel as rows;
        with them a resumed run repeats the same sums.
        """
        self.commit()
        return {
            "order": self.order,
            "rows": [name for name, spec in self._specs.items() if spec.row_size],
            "share": torch.tensor([self.place, self.num_shares], dtype=torch.int64, device="cpu"),
            "compensation": self.compensation.state_dict(),
            "statistics": self.statistics.state_dict(),
            "thresholds": self.outlet.state_dict(),
        }

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of `state_dict` by kind: residual, velocity, statistics."""
        return {**self.compensation.num_bytes(), "statistics": self.statistics.num_bytes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; tensors that it does not know stay as they are.

        Raises: ValueError, before anything changes, for the state of another share, or of tensors
            that are not here."""
        if self.is_under_way:
            raise RuntimeError("a state can be loaded only between steps; finish this one first")
        self.commit()
        share = tuple(state["share"].tolist() if "share" in state else (0, 1))
        mine = (self.place, self.num_shares)
        if share != mine:
            raise ValueError(
                f"the state is of share (number, of how many) {share} of every tensor; allowed: "
                f"{mine}, as ranks are placed here. Start them on the nodes as before"
            )
        thresholds, statistics = state.get("thresholds", {}), state.get("statistics", {})
        self.outlet.check(thresholds, self._specs.keys())
        kept = (state["compensation"]["residual"], state["compensation"]["velocity"], thresholds)
        self.statistics.check(statistics, added=self._specs.keys() - set().union(*kept))
        described = (
            {name: getattr(spec, what) for name, spec in self._specs.items()}
            for what in ("device", "numel", "dtype")
        )
        self.compensation.load_state_dict(state["compensation"], *described)
        self.statistics.load_state_dict(statistics)
        self.outlet.load_state_dict(thresholds)
