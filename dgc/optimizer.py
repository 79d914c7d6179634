"""DistributedOptimizer: a torch optimizer whose gradients are compressed, exchanged and averaged.

Owns: what fits together, and what a step does, also when some gradient is infinite or NaN. Holds
the inner optimizer; makes no class of its own for it. intake.py takes the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from dgc import apply
from dgc.checks import (
    MAKE_ANEW,
    at_least_one,
    check_all_exchanged,
    check_compression,
    check_optimizer,
    check_row_sparse,
    check_same_everywhere,
    match_parameters,
    refuse_capture,
)
from dgc.comm import Comm
from dgc.compensate import Compensation
from dgc.compression import Compression
from dgc.exchange import Exchange
from dgc.fresh_state import drop_zeros, fill_in
from dgc.holding import check_free, hold, let_go
from dgc.intake import Intake
from dgc.momentum import MARK, Momentum
from dgc.replicas import Replicas
from dgc.roles import check_groups, delegate_statistics, make_specs, resolve
from dgc.scaling import Scaling
from dgc.topology import choose_islands
from dgc.undone import Undone
from dgc.view import View

DENSE = Compression(
    density=1.0, momentum_correction=False, preconditioning="after", two_level=False
)

_log = logging.getLogger(__name__)


class DistributedOptimizer(View):
    """Average gradients over ranks during backward, then step the optimizer it holds.

    Args:
        optimizer: any torch optimizer. One of `optim` hands the second moments of compressible
            tensors over to the workers (Compression.preconditioning), and takes the few entries
            that arrive; so does torch.optim.SGD. Others see the averaged gradient in `p.grad`.
        named_parameters: as `model.named_parameters()`; every parameter of `optimizer` once.
        comm: this rank's collectives.
        compression: Deep Gradient Compression, or None for a dense all-reduce.
        micro_batches_per_step: backward passes that make one step; their gradients are summed, so
            divide each loss by it.
        bucket_bytes: float32 bytes of gradient that leave together, at least.
        seed: of stochastic rounding; each rank adds its own number.
        grad_scaler: the one that scales the losses, if one does. Call its `step` and `update` as
            usual; gradients are divided by its scale before anything else, also before clipping.
        row_sparse: names of the parameters whose gradients are sparse tensors: those of embeddings
            with sparse=True (`row_sparse_names(model)`). They travel as row numbers and rows, in
            full, and reach the optimizer as sparse tensors.

    With momentum correction, plain or Nesterov, torch.optim.SGD's momentum acts in the correction,
    with the value that its groups have when a step's first gradient comes, and not in SGD itself.
    Its weight decay, which would have gone through the momentum, is then applied to the parameters
    as weight_decay / (1 - momentum): the same pull in the long run, and no third buffer (the
    predecessors keep one). The groups keep their own values, which people see and schedulers
    change. Decoupled weight decay of the optimizers of `optim` reaches all of a tensor in every
    step, however few entries arrive.

    A step in which a gradient of any rank is infinite, NaN, or beyond 2**40 (in float64 2**100) is
    undone on all ranks, to the bit: nothing moves, `stats.skipped` says why, and rank 0 logs it.
    After 100 such steps in a row: FloatingPointError.

    Rank 0's parameters are given to all when this is made; buffers, such as batch-norm statistics,
    are the caller's. A parameter without a gradient in a step counts as zero on this rank. `step`,
    `synchronize`, `set_density` and `check_replicas` are collective: all ranks must call them
    alike. Learning-rate schedulers may be given this optimizer or the inner one; they share
    `param_groups`.

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

    _step_supports_amp_scaling = True  # GradScaler.step then leaves infinities to us

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        comm: Comm,
        compression: Compression | None = None,
        micro_batches_per_step: int = 1,
        bucket_bytes: int = 16 * 2**20,
        seed: int = 0,
        grad_scaler: GradScaler | None = None,
        row_sparse: Collection[str] = (),
    ) -> None:
        # Optimizer.__init__ would build groups of its own; ours are the inner optimizer's.
        self.inner, self.comm = optimizer, comm
        self.micro_batches_per_step = at_least_one(micro_batches_per_step)
        self._bucket_bytes = bucket_bytes
        check_optimizer(optimizer)
        self._named = match_parameters(optimizer, named_parameters)
        check_free(self._named)
        self._exchanged = {id(parameter) for parameter in self._named.values()}
        self.compression = resolve(check_compression(compression) or DENSE, optimizer)
        self._row_sparse = check_row_sparse(row_sparse, self._named)
        has_scaler = grad_scaler is not None and grad_scaler.is_enabled()
        rows = sorted(row_sparse)
        settings = (self.compression, micro_batches_per_step, bucket_bytes, rows, has_scaler)
        check_same_everywhere(comm, self._named, settings)
        for name, parameter in self._named.items():
            comm.broadcast(parameter.detach(), f"initial.{name}")
        self._undone = Undone(comm.rank)
        self._is_synchronized = self._has_stepped = self._is_closed = False
        self._elements: apply.Elements = {}
        self._scaling = Scaling(
            self.compression, grad_scaler, world_size=comm.world_size,
            num_tensors=len(self._named),
        )  # fmt: skip
        self._rows = [self._named[name] for name in rows]
        optimizer.state.pop(MARK, None)
        self._momentum = Momentum(optimizer, self.compression, self._named, self._row_sparse)
        compensation = Compensation(
            *self._momentum.now(), self.compression.mask_velocity, self.compression.residual_dtype,
            self.compression.velocity_dtype, seed + comm.rank, self._momentum.is_sgds,
        )  # fmt: skip
        check_groups(optimizer, self.compression, self._rows)
        dense = {n: p for n, p in self._named.items() if n not in self._row_sparse}
        islands = choose_islands(comm, self.compression)
        statistics = delegate_statistics(optimizer, dense, self.compression)
        self._exchange = Exchange(comm, self.compression, compensation, statistics, islands)
        self._exchange.before_step = partial(_begin_step, self._momentum, self._exchange)
        self._replicas = Replicas(comm, optimizer, self._named)
        self.set_density(self.compression.density_at(0))
        self._intake = Intake(
            self._named, self._row_sparse, self._exchange, self._scaling, micro_batches_per_step
        )
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
        self._intake.close()
        let_go(self, self._named)
        names = self._exchange.statistics.preconditioners.keys()
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
        if not self._has_stepped:
            fill_in(self.inner, self._named.values(), self._rows)
        return self._momentum.mark(self.inner.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Between steps, on all ranks, or before the first step on rank 0 (see the class)."""
        self.inner.load_state_dict(self._momentum.unmark(state))
        self.compensation.momentum, self.compensation.nesterov = self._momentum.now()
        self._has_stepped, self._replicas.are_new = False, True

    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has: residuals, velocities, statistics. Tensors only."""
        return self._exchange.state_dict()

    def load_worker_state_dict(self, state: dict[str, Any]) -> None:
        """Between steps, on all ranks. Parameters of which it knows nothing begin at 0.

        Raises: ValueError, before anything changes, for a state of other tensors than those here.
        """
        self._exchange.load_state_dict(state)
        self._replicas.are_new = True

    def check_replicas(self) -> None:
        """Compare options, parameters and optimizer state of all ranks, to the bit. A collective.

        Buffers, such as batch-norm statistics, are not compared. Reads each tensor once.
        Raises: RuntimeError, on all ranks, that names the first rank and parameter to differ.
        """
        self._replicas.check(self._settings(), RuntimeError, "check_replicas")

    def _settings(self) -> dict[str, Any]:
        return {"density": self.density, "steps exchanged": self.compensation.num_steps}

    def set_epoch(self, epoch: int) -> float:
        """Set the density of an epoch, counted from 0, and return it. Between steps only."""
        density = self.compression.density_at(epoch)
        self.set_density(density)
        return density

    def set_density(self, density: float) -> None:
        """Send this fraction of each tensor from the next step on. Between steps only."""
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}; allowed: above 0 and at most 1")
        specs = make_specs(
            self._named, self.compression, self._row_sparse, self._exchange.share_numel
        )
        self._exchange.plan(specs, density, self._bucket_bytes)
        self.density = density

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._exchange.is_under_way:
            raise RuntimeError(
                "zero_grad() between backward() and step() would lose gradients that are already "
                "on their way; call it after step(). Where the backward pass of another loss "
                "reaches these parameters (a generator's, through the discriminator), keep them "
                "out of it: requires_grad_(False) on them meanwhile, backward(inputs=...) or "
                "torch.autograd.grad"
            )
        self._intake.count_anew()
        self.inner.zero_grad(set_to_none)

    @torch.compiler.disable
    def synchronize(self) -> None:
        """Finish the exchange; `step` calls it.

        Afterwards `p.grad` is the mean over ranks where that arrived densely, or where the
        optimizer takes no entries. Where the step was undone it is None.
        """
        if self._is_synchronized:
            return
        self._intake.shut()
        update = self._exchange.finish()
        self._elements = {}
        if update is None:
            self.inner.zero_grad()
        else:
            with self._momentum.in_correction(self.compensation.momentum):
                self._elements = apply.hand_over(self.inner, self._named, update)
        self._scaling.end_step()
        self._is_synchronized = True

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, then step the inner optimizer. A closure is run once, before both."""
        if self._is_closed:
            raise RuntimeError("step() after close(); make a DistributedOptimizer anew")
        self._scaling.check_call(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._replicas.are_new:
            self._replicas.check_new(self._settings())
            drop_zeros(self.inner)
        self.synchronize()
        self._is_synchronized = False
        self._intake.open()
        check_groups(self.inner, self.compression, self._rows)
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


def _begin_step(momentum: Momentum, exchange: Exchange) -> None:
    refuse_capture(exchange.buckets[0].specs[0].device)
    momentum.begin_step(exchange)
