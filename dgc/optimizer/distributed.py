"""DistributedOptimizer: a torch optimizer whose gradients are compressed, exchanged and averaged.

Owns: what a step does, also when some gradient is infinite or NaN. It holds the inner optimizer
rather than deriving a class from it. hooks/intake.py takes the gradients.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from dgc.comm.interface import Comm
from dgc.compression import Compression
from dgc.optimizer import apply
from dgc.optimizer.clipping import clip_grad_norm
from dgc.optimizer.hooks.holding import hold, let_go
from dgc.optimizer.hooks.intake import FirstStep, Intake
from dgc.optimizer.layout import Layout
from dgc.optimizer.replicas import Replicas
from dgc.optimizer.saved import Saved
from dgc.optimizer.setup.checks import (
    MAKE_ANEW,
    at_least_one,
    check_all_exchanged,
    check_comm,
)
from dgc.optimizer.setup.exchange import make_alike_everywhere, make_exchange
from dgc.optimizer.setup.fresh_state import drop_zeros, fill_in
from dgc.optimizer.setup.given import check_given
from dgc.optimizer.setup.options import check_groups
from dgc.optimizer.undone import Undone
from dgc.optimizer.view import View
from dgc.worker.scaling import Scaling

_log = logging.getLogger(__name__)


class DistributedOptimizer(View):
    """Average gradients over ranks during backward, then step the optimizer it holds.

    Args:
        optimizer: any torch optimizer. One of `optim` hands the second moments of compressible
            tensors over to the workers (Compression.preconditioning), and takes the few entries
            that arrive; so does torch.optim.SGD. Others see the averaged gradient in `p.grad`.
        named_parameters: as `model.named_parameters()`; every parameter of `optimizer` once. None:
            they are named after their place in the optimizer's groups.
        comm: this rank's collectives.
        compression: Deep Gradient Compression, or None for a dense all-reduce.
        micro_batches_per_step: backward passes that make one step; their gradients are summed, so
            divide each loss by it.
        bucket_bytes: bytes of gradient that leave together, at least. None: a twelfth of all, but
            at least 16 and at most 128 MiB.
        seed: of stochastic rounding; each rank adds its own number.
        grad_scaler: the one that scales the losses, if one does. Call its `step` and `update` as
            usual; gradients are divided by its scale before anything else, also before clipping.
        row_sparse: names of the parameters whose gradients are sparse tensors: those of embeddings
            with sparse=True (`row_sparse_names(model)`). They travel as row numbers and rows, in
            full, and reach the optimizer as sparse tensors. Others are found in the first step, if
            they have a gradient in it; what such a parameter was given before, for dense gradients
            (a second moment), is made and given up again.
        horovods: arguments of Horovod's DistributedOptimizer; see setup/horovod_names.py.

    With momentum correction, plain or Nesterov, torch.optim.SGD's momentum acts in the correction,
    with the value that its groups have when a step's first gradient comes, and not in SGD itself.
    Its weight decay, which would have gone through the momentum, is then applied to the parameters
    as weight_decay / (1 - momentum): the same pull in the long run, and no third buffer (the
    predecessors keep one). The groups keep their own values, which people see and schedulers
    change. Decoupled weight decay of the optimizers of `optim` reaches all of a tensor in every
    step, however few entries arrive.

    Until `step`, a gradient that backward has finished is not in `p.grad`: a stand-in is, which
    zero_grad() of the module may drop, and which refuses to be read (hooks/handed_over.py). A
    tensor that is frozen (requires_grad_(False)) on all ranks is not stepped, and what the ranks
    keep of it rests; nor is anything in a step in which no rank has any gradient.

    After the first step buckets are laid out anew, in the order in which rank 0's gradients came.

    A step in which a gradient of any rank is infinite, NaN, or beyond 2**40 (in float64 2**100) is
    undone on all ranks, to the bit: nothing moves, `stats.skipped` says why, and rank 0 logs it.
    After 100 such steps in a row: FloatingPointError.

    Rank 0's parameters are given to all when this is made; buffers, such as batch-norm statistics,
    are the caller's. A parameter without a gradient in a step counts as zero on this rank. `step`
    (or `abandon_step`), `synchronize`, `set_density` and `check_replicas` are collective: all ranks
    must call them alike. Learning-rate schedulers may be given this optimizer or the inner one;
    they share `param_groups`.

    A state may be loaded on every rank, or before the first step on rank 0 alone, if
    `hvd.broadcast_parameters` and `hvd.broadcast_optimizer_state` follow; into the inner optimizer
    before this is made, or here. In the first step after, ranks compare all options, parameters and
    optimizer state, which reads each once, and raise ValueError where they differ. A checkpoint of
    a dense run does: its momentum buffers, or second moments, become the workers'.
    Raises: ValueError for parameters that are missing, double, held by another
        DistributedOptimizer, or of other shapes or dtypes on other ranks, for optimizers that
        evaluate the loss again within a step (LBFGS), and for settings that do not go together,
        with the reason.
    """

    _step_supports_amp_scaling = True  # tells GradScaler.step to leave infinities to us

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        comm: Comm | None = None,
        compression: Compression | None = None,
        micro_batches_per_step: int = 1,
        bucket_bytes: int | None = None,
        seed: int = 0,
        grad_scaler: GradScaler | None = None,
        row_sparse: Collection[str] = (),
        **horovods: Any,
    ) -> None:
        super().__init__(optimizer)
        self.comm = check_comm(comm)
        given = check_given(
            optimizer, named_parameters, compression, micro_batches_per_step, row_sparse, horovods
        )
        self._named, self.compression = given.named, given.compression
        self._exchanged = {id(parameter) for parameter in self._named.values()}
        self._scaling = Scaling(
            self.compression, grad_scaler, world_size=self.comm.world_size,
            num_tensors=len(self._named),
        )  # fmt: skip
        make_alike_everywhere(self.comm, given, bucket_bytes, self._scaling.has_scaler)
        self._undone, self._saved = Undone(self.comm.rank), Saved(self.comm.rank)
        self._is_synchronized = self._has_stepped = self._is_closed = False
        self._elements: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._momentum, self._exchange = make_exchange(self.comm, optimizer, given, seed)
        self._replicas = Replicas(self.comm, optimizer, self._named)
        density = self.compression.density_at(0)
        self._layout = Layout(self._named, given.row_sparse, self._exchange, bucket_bytes, density)
        self._intake = Intake(
            self._named, given.row_sparse, self._exchange, self._scaling,
            given.micro_batches_per_step,
        )  # fmt: skip
        hold(self, self._intake, self._named)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError(
            f"the exchange is laid out once; add the group to the inner optimizer, and {MAKE_ANEW}"
        )

    def close(self) -> None:
        """Let go of the parameters, so that another DistributedOptimizer may take them.

        The inner optimizer is then as it would be alone. Second moments that were the workers' it
        begins anew, with all state of those parameters; what the workers have not sent is not
        applied. Keep `worker_state_dict`, and give it to `load_worker_state_dict` of the next one,
        to go on where this one ended, also with parameters added since.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._saved.tell()
        self._exchange.end_step(stands=True)
        self._intake.close()
        let_go(self, self._named)
        names = self._exchange.kept.statistics.preconditioners.keys()
        for name in names:
            self.inner.reclaim_second_moment(self._named[name])
        if names and self._has_stepped and self.comm.rank == 0:
            kind = type(self.inner).__name__
            _log.warning("closed: %s begins the state of %d tensors, whose second moments were the "
                         "workers', anew", kind, len(names))  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: equal on all ranks. See also `worker_state_dict`.

        Before the first step it holds the state that the optimizer would begin with, so that all
        ranks have the same entries whether they have loaded a checkpoint or not.
        """
        self._hooked_state("state_dict", "pre")
        if not self._has_stepped:
            fill_in(self.inner, self._named.values(), self._layout.rows)
        has_exchanged = self.compensation.num_steps > 0
        self._saved.note_shared(has_exchanged and sum(self.worker_state_bytes().values()))
        state = self._momentum.mark(self.inner.state_dict())
        return self._hooked_state("state_dict", "post", state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Between steps, on all ranks, or before the first step on rank 0 (see the class)."""
        state = self._hooked_state("load_state_dict", "pre", dict(state))
        self.inner.load_state_dict(self._momentum.unmark(state))
        self.compensation.momentum, self.compensation.nesterov = self._momentum.now()
        self._has_stepped, self._replicas.are_new = False, True
        self._hooked_state("load_state_dict", "post")

    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has: residuals, velocities, statistics, and the order of buckets.

        Tensors and names only. Without it a run that is taken up begins with residuals of 0.
        """
        self._saved.note_worker()
        return self._exchange.state_dict()

    def load_worker_state_dict(self, state: dict[str, Any]) -> None:
        """Between steps, on all ranks. Parameters of which it knows nothing begin at 0.

        Raises: ValueError, before anything changes, for a state of other tensors than those here.
        """
        self._exchange.load_state_dict(state)
        self._lay_out_as(state)

    def is_own_worker_state(self, state: Mapping[str, Any]) -> bool:
        """Tell whether `load_worker_state_dict` can take this up, as ranks are placed here: in two
        levels a worker keeps a slice of every tensor, by its place among its island."""
        return self._exchange.is_of_here(state)

    def load_worker_states(self, states: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Go on from the workers of a job of another size, or placed otherwise. A collective.

        Between steps. What those workers had not sent is kept: its sum, divided by their number, is
        what this job's workers have not sent, each with its share. Statistics are averaged.
        Args: states: (rank, its `worker_state_dict`) of the workers that this rank has read; over
            all ranks each of the old job's once.
        Raises: ValueError, on all ranks and before anything changes, for states of other tensors
            than those here, and for ranks that are missing or come twice.
        """
        self._lay_out_as(self._exchange.take_over(states))

    def _lay_out_as(self, state: Mapping[str, Any]) -> None:
        self._take_as_rows(set(state.get("rows", ())) - self._layout.row_sparse)
        self._layout.learn(state.get("order") or self._layout.order)
        self._layout.refresh()
        self._replicas.are_new = True

    def check_replicas(self) -> None:
        """Compare options, parameters and optimizer state of all ranks, to the bit. A collective.

        Buffers, such as batch-norm statistics, are not compared. Reads each tensor once.
        Raises: RuntimeError, on all ranks, that names the first rank and parameter to differ.
        """
        self._replicas.check(self._settings(), RuntimeError, "check_replicas")

    def _settings(self) -> dict[str, Any]:
        # A checksum, as a model has many names.
        order = zlib.crc32(repr(self._exchange.order).encode())
        steps = self.compensation.num_steps
        return {"density": self.density, "steps exchanged": steps, "checksum of the order": order}

    def set_epoch(self, epoch: int) -> float:
        """Set the density of an epoch, counted from 0, and return it. Between steps only."""
        density = self.compression.density_at(epoch)
        self.set_density(density)
        return density

    def set_density(self, density: float) -> None:
        """Send this fraction of each tensor from the next step on. Between steps only."""
        self._layout.set_density(density)

    @property
    def density(self) -> float:
        return self._layout.density

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, or after `synchronize` the update, on all ranks alike.

        Raises: RuntimeError where some of the gradients have left already.
        """
        if self._exchange.num_started:
            raise RuntimeError(
                "zero_grad() between backward() and step() would lose gradients that are already "
                "on their way; call it after step(), or give up the step with abandon_step(). "
                "Where the backward pass of another loss reaches these parameters (a generator's, "
                "through the discriminator), keep them out of it: requires_grad_(False) on them "
                "meanwhile, backward(inputs=...) or torch.autograd.grad"
            )
        if self._is_synchronized:
            self._exchange.end_step(stands=False)
            self._begin_anew()
        self._intake.drop_all()
        self.inner.zero_grad(set_to_none)

    @torch.compiler.disable
    def synchronize(self) -> None:
        """Finish the exchange; `step` calls it.

        Afterwards `p.grad` is the mean over ranks where that arrived densely, or where the
        optimizer takes no entries. Where the step was undone it is None.
        """
        if self._is_synchronized:
            return
        if self._intake.first is not None:
            self._learn(self._intake.first)
        self._intake.shut()
        update = self._exchange.finish()
        self._elements = {}
        if update is None:
            self.inner.zero_grad()
        else:
            with self._momentum.in_correction(self.compensation.momentum):
                self._elements = apply.hand_over(self.inner, self._named, update)
        self._scaling.end_step(self.stats)
        self._is_synchronized = True

    def _learn(self, first: FirstStep) -> None:
        """Let all ranks know what this first step tells: the order in which gradients come, and
        which are sparse though they were not named. A collective."""
        everyone = self.comm.all_gather_object((list(first.order), sorted(first.rows)))
        if not self._layout.order:
            self._layout.learn(everyone[0][0])
        self._take_as_rows(set().union(*(names for _, names in everyone)))
        self._intake.first = None

    def _take_as_rows(self, names: Collection[str]) -> None:
        """Let tensors of which nobody knew it be row-sparse from now on. On all ranks alike."""
        if not names:
            return
        for name in names & self._exchange.kept.statistics.preconditioners.keys():
            self.inner.reclaim_second_moment(self._named[name])
        self._layout.take_as_rows(names)
        self._intake.row_sparse = self._layout.row_sparse
        self._momentum.leave_out_rows(names)
        check_groups(self.inner, self.compression, self._layout.rows)

    def _begin_anew(self) -> None:
        self._is_synchronized = False
        self._intake.open()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """As in Horovod: around a `step` that follows `synchronize`. Here it only checks that; such
        a step never synchronizes again."""
        if not self._is_synchronized:
            raise RuntimeError("skip_synchronize() needs a synchronize() before it")
        yield

    @property
    def backward_passes_per_step(self) -> int:
        """Horovod's name of micro_batches_per_step."""
        return self._intake.num_parts

    micro_batches_per_step = backward_passes_per_step

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Let so many backward passes make one step from now on. Between steps; on all ranks."""
        if self._exchange.is_under_way:
            raise RuntimeError("set_backward_passes_per_step() within a step; call it after step()")
        self._intake.num_parts = at_least_one(passes)

    @torch.compiler.disable
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale the gradient, before `step`, so that its norm is at most max_norm; return what the
        norm was. On all ranks.

        In a dense exchange it synchronizes first, and clips the mean over ranks. Where
        Compression(clip_scope="global") leaves gradients in `p.grad` until `step`, it clips this
        rank's own.
        Raises: RuntimeError where a gradient is gone as soon as backward has finished it.
        """
        if all(map(self._exchange.returns_gradients, self._named)):
            self.synchronize()
        elif not self._scaling.clips_globally or self._is_synchronized:
            raise RuntimeError(
                "there is no gradient to clip: each was added to a residual as backward finished "
                f"it. Give the bound to the DistributedOptimizer, Compression(clip_norm={max_norm})"
                ", which clips each gradient before that; or leave gradients in p.grad until "
                "step(), Compression(clip_norm=math.inf, clip_scope='global')"
            )
        return clip_grad_norm(self._named.values(), max_norm, norm_type, error_if_nonfinite)

    @torch.compiler.disable
    def abandon_step(self) -> None:
        """Undo the step under way on all ranks, whatever their gradients are.

        For a rank on which something failed between the last step and this one's end, such as an
        exception in backward: it calls this, while the others call `step` as always (or this, too).
        Raises: RuntimeError after `synchronize`, when the others may have stepped.
        """
        if self._is_synchronized:
            raise RuntimeError(
                "abandon_step() after synchronize(): the other ranks may have stepped. zero_grad() "
                "on all ranks drops what has arrived"
            )
        self._exchange.spoil()
        self._step()

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, then step the inner optimizer. A closure is run once, before both."""
        return self._with_hooks(self._step, *(() if closure is None else (closure,)))

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._is_closed:
            raise RuntimeError("step() after close(); make a DistributedOptimizer anew")
        self._scaling.check_call(self)
        self._saved.tell()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._replicas.are_new:
            self._replicas.check_new(self._settings())
            drop_zeros(self.inner)
        self.synchronize()
        self._exchange.end_step(stands=True)
        self._layout.refresh()
        self._begin_anew()
        check_groups(self.inner, self.compression, self._layout.rows)
        check_all_exchanged(self.inner, self._exchanged)
        device = next(iter(self._named.values())).device
        self._scaling.tell_scaler(self, self.stats.skipped is not None, device)
        if self.stats.skipped:
            self._undone.note(self.stats.skipped)
            return loss
        self._undone.end_row()
        with self.stats.timed("optimizer"):
            with self._momentum.in_correction(self.compensation.momentum):
                apply.step(self.inner, self._elements)
        self._elements = {}
        self._has_stepped = True
        return loss
