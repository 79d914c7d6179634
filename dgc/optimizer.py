"""DistributedOptimizer: a torch optimizer whose gradients are compressed, exchanged and averaged.

Owns: what fits together, and what a step does, also when some gradient is infinite or NaN. Holds
the inner optimizer; makes no class of its own for it. intake.py takes the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from dgc import apply
from dgc.buckets import Bucket, explain
from dgc.checks import (
    at_least_one,
    check_optimizer,
    check_row_sparse,
    check_same_everywhere,
    match_parameters,
)
from dgc.comm import Comm
from dgc.compensate import Compensation
from dgc.compression import Compression
from dgc.exchange import Exchange
from dgc.intake import Intake
from dgc.roles import (
    check_groups,
    delegate_statistics,
    make_specs,
    resolve,
    take_over_momentum,
)
from dgc.scaling import Scaling
from dgc.stats import StepStats
from dgc.topology import choose_islands

DENSE = Compression(
    density=1.0, momentum_correction=False, preconditioning="after", two_level=False
)
MAX_SKIPPED_IN_A_ROW = 100

_log = logging.getLogger(__name__)


class DistributedOptimizer(Optimizer):
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

    With momentum correction, plain or Nesterov, torch.optim.SGD's momentum moves into the
    correction and is 0 in SGD itself. Its weight decay, which would have gone through the momentum,
    is then applied to the parameters as weight_decay / (1 - momentum): the same pull in the long
    run, and no third buffer (the predecessors keep one). Decoupled weight decay of the optimizers
    of `optim` reaches all of a tensor in every step, however few entries arrive.

    A step in which a gradient of any rank is infinite, beyond 2**40, or NaN is undone on all ranks,
    to the bit: nothing moves, `stats.skipped` says why, and rank 0 logs it. After 100 such steps in
    a row: FloatingPointError.

    Rank 0's parameters are given to all when this is made; buffers, such as batch-norm statistics,
    are the caller's. A parameter without a gradient in a step counts as zero on this rank. `step`,
    `synchronize` and `set_density` are collective: all ranks must call them alike. Learning-rate
    schedulers may be given this optimizer or the inner one; they share `param_groups`.
    Raises: ValueError for parameters that are missing, double, or of other shapes on other ranks,
        for optimizers that evaluate the loss again within a step (LBFGS), and for settings that do
        not go together, with the reason.
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
        self._named = match_parameters(optimizer, named_parameters)
        self._exchanged = {id(parameter) for parameter in self._named.values()}
        check_optimizer(optimizer)
        self.compression = resolve(compression or DENSE, optimizer)
        self._row_sparse = check_row_sparse(row_sparse, self._named)
        settings = (self.compression, micro_batches_per_step, bucket_bytes, sorted(row_sparse))
        check_same_everywhere(comm, self._named, settings)
        for name, parameter in self._named.items():
            comm.broadcast(parameter.detach(), f"initial.{name}")
        self._num_skipped_in_a_row = 0
        self._is_synchronized = False
        self._elements: apply.Elements = {}
        self._scaling = Scaling(
            self.compression, grad_scaler, world_size=comm.world_size,
            num_tensors=len(self._named),
        )  # fmt: skip
        self._rows = [self._named[name] for name in self._row_sparse]
        momentum, nesterov = take_over_momentum(optimizer, self.compression, self._rows)
        compensation = Compensation(
            momentum, nesterov, self.compression.mask_velocity,
            self.compression.residual_dtype, self.compression.velocity_dtype, seed + comm.rank,
        )  # fmt: skip
        check_groups(optimizer, self.compression, momentum, self._rows)
        dense = {n: p for n, p in self._named.items() if n not in self._row_sparse}
        statistics = delegate_statistics(optimizer, dense, self.compression)
        islands = choose_islands(comm, self.compression)
        self._exchange = Exchange(comm, self.compression, compensation, statistics, islands)
        self.set_density(self.compression.density_at(0))
        self._intake = Intake(
            self._named, self._row_sparse, self._exchange, self._scaling, micro_batches_per_step
        )

    # What schedulers, scalers and people look for on an optimizer is the inner optimizer's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError(
            "the exchange is laid out once; close() the DistributedOptimizer, add the group to the "
            "inner optimizer, and make it anew"
        )

    def close(self) -> None:
        """Let go of the parameters, so that another DistributedOptimizer may take them."""
        self._intake.close()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: equal on all ranks. See also `worker_state_dict`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has: residuals, velocities, statistics. Tensors only."""
        return self._exchange.state_dict()

    def load_worker_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state)

    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: `residual`, `velocity`, `statistics`."""
        return self._exchange.state_bytes()

    @property
    def buckets(self) -> list[Bucket]:
        """What leaves together, in order; a bucket says whether it is sparse."""
        return self._exchange.buckets

    def explain(self) -> str:
        """Return a table of what leaves by which protocol, and of what the cost model says."""
        return explain(self.buckets, self._exchange.group.world_size)

    @property
    def stats(self) -> StepStats:
        """What this rank sent in the last step, and where the time went."""
        return self._exchange.stats

    @property
    def compensation(self) -> Compensation:
        """This rank's velocities and residuals."""
        return self._exchange.compensation

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._exchange.is_under_way:
            raise RuntimeError(
                "zero_grad() between backward() and step() would lose gradients that are already "
                "on their way; call it after step()"
            )
        self._intake.count_anew()
        self.inner.zero_grad(set_to_none)

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
            self._elements = apply.hand_over(self.inner, self._named, update)
        self._scaling.end_step()
        self._is_synchronized = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, then step the inner optimizer. A closure is run once, before both."""
        self._scaling.check_call(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.synchronize()
        self._is_synchronized = False
        self._intake.open()
        check_groups(self.inner, self.compression, self.compensation.momentum, self._rows)
        self._check_all_exchanged()
        device = next(iter(self._named.values())).device
        self._scaling.tell_scaler(self, self.stats.skipped is not None, device)
        if self.stats.skipped:
            self._note_skipped()
            return loss
        self._num_skipped_in_a_row = 0
        with self.stats.timed("optimizer"):
            apply.step(self.inner, self._elements)
        self._elements = {}
        return loss

    def _note_skipped(self) -> None:
        self._num_skipped_in_a_row += 1
        reason = f"the gradient of {self.stats.skipped} has infinite or NaN entries"
        if self._num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{reason}, the {MAX_SKIPPED_IN_A_ROW}th step in a row that had to be undone; "
                f"lower the learning rate, lengthen its warm-up or clip (dgc.clip_norm)"
            )
        if self.comm.rank == 0:
            _log.warning("step undone on all ranks: %s", reason)

    def _check_all_exchanged(self) -> None:
        """Refuse gradients that this rank would apply alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                is_ours = id(parameter) in self._exchanged or not parameter.numel()
                if parameter.grad is not None and not is_ours:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(parameter.shape)} has a gradient but did not "
                        f"require one, or was not there, when the DistributedOptimizer was made; "
                        f"close() it and make it anew after unfreezing or adding parameters"
                    )
