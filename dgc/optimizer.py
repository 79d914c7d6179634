"""DistributedOptimizer: a torch optimizer whose gradients are compressed, exchanged and averaged.

Owns: the hooks on the parameters, gradient accumulation, local clipping, and the handing over of
SGD's momentum to the correction. Holds the inner optimizer; makes no class of its own for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dgc.checks import at_least_one, check_same_everywhere, match_parameters
from dgc.comm import Comm
from dgc.compensate import Compensation
from dgc.compression import Compression
from dgc.exchange import Bucket, Exchange, StepStats, TensorSpec

DENSE = Compression(density=1.0, momentum_correction=False)


class DistributedOptimizer(Optimizer):
    """Average gradients over ranks during backward, then step the optimizer it holds.

    Args:
        optimizer: any torch optimizer. It sees each parameter's averaged gradient in `p.grad`.
        named_parameters: as `model.named_parameters()`; every parameter of `optimizer` once.
        comm: this rank's collectives.
        compression: Deep Gradient Compression, or None for a dense all-reduce.
        micro_batches_per_step: backward passes that make one step; their gradients are summed, so
            divide each loss by it.
        bucket_bytes: float32 bytes of gradient that leave together, at least.
        seed: of the samples from which thresholds are taken; each rank adds its own number.

    With momentum correction, plain or Nesterov, torch.optim.SGD's momentum moves into the
    correction and is 0 in SGD itself. Its weight decay, which would have gone through the momentum,
    is then applied to the parameters as weight_decay / (1 - momentum): the same pull in the long
    run, and no third buffer (the predecessors keep one).

    Rank 0's parameters are given to all when this is made; buffers, such as batch-norm statistics,
    are the caller's. A parameter without a gradient in a step counts as zero on this rank. `step`,
    `synchronize` and `set_density` are collective: all ranks must call them alike. Learning-rate
    schedulers may be given this optimizer or the inner one; they share `param_groups`.
    Raises: ValueError for parameters that are missing, double, or of other shapes on other ranks,
        and for optimizers that evaluate the loss again within a step (LBFGS).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        comm: Comm,
        compression: Compression | None = None,
        micro_batches_per_step: int = 1,
        bucket_bytes: int = 4 * 2**20,
        seed: int = 0,
    ) -> None:
        # Optimizer.__init__ would build groups of its own; ours are the inner optimizer's.
        self.inner, self.comm = optimizer, comm
        self.compression = compression or DENSE
        self.micro_batches_per_step = at_least_one(micro_batches_per_step)
        self._bucket_bytes = bucket_bytes
        self._named = match_parameters(optimizer, named_parameters)
        self._exchanged = {id(parameter) for parameter in self._named.values()}
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS evaluates the loss within a step, where gradients are this "
                             "rank's own; use an optimizer of one gradient a step")  # fmt: skip
        settings = (self.compression, micro_batches_per_step, bucket_bytes)
        check_same_everywhere(comm, self._named, settings)
        for name, parameter in self._named.items():
            comm.broadcast(parameter.detach(), f"initial.{name}")
        self._num_backward = dict.fromkeys(self._named, 0)
        self._is_synchronized = False
        self._exchange = Exchange(
            comm, self.compression, _take_over_momentum(optimizer, self.compression), seed
        )
        self.set_density(self.compression.density_at(0))
        for name, parameter in self._named.items():
            parameter.register_post_accumulate_grad_hook(self._make_hook(name))

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
            "the exchange is laid out once; add the group to the inner optimizer before, and make "
            "the DistributedOptimizer anew"
        )

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's: equal on all ranks. See also `worker_state_dict`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has: residuals, velocities, random states. Tensors only."""
        return self._exchange.state_dict()

    def load_worker_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state)

    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps, by kind: `residual`, `velocity`."""
        kinds = self.compensation.state_dict()
        return {kind: sum(t.nbytes for t in tensors.values()) for kind, tensors in kinds.items()}

    @property
    def buckets(self) -> list[Bucket]:
        """What leaves together, in order; a bucket says whether it is sparse."""
        return self._exchange.buckets

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
        min_numel = self.compression.min_numel
        specs = [
            TensorSpec(name, p.numel(), p.device, p.dim() > 1 and p.numel() >= min_numel)
            for name, p in reversed(self._named.items())  # the order in which backward goes
        ]
        self._exchange.plan(specs, density, self._bucket_bytes)
        self.density = density

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._exchange.is_under_way:
            raise RuntimeError(
                "zero_grad() between backward() and step() would lose gradients that are already "
                "on their way; call it after step()"
            )
        self._num_backward = dict.fromkeys(self._named, 0)
        self.inner.zero_grad(set_to_none)

    def synchronize(self) -> None:
        """Finish the exchange: afterwards `p.grad` is the mean over ranks. `step` calls it."""
        if self._is_synchronized:
            return
        scale = self._global_clip_scale()
        for name in self._exchange.missing():
            self._send(name, scale)
        for name, mean_N in self._exchange.finish():
            parameter = self._named[name]
            parameter.grad = mean_N.view_as(parameter).to(parameter.dtype)
        self._num_backward = dict.fromkeys(self._named, 0)
        self._is_synchronized = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Synchronize, then step the inner optimizer. A closure is run once, before both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.synchronize()
        self._is_synchronized = False
        if self._exchange.compensation.momentum and any(g["momentum"] for g in self.param_groups):
            raise RuntimeError(
                "SGD's momentum was changed from 0 while the momentum correction has it, so it "
                "would act twice; set momentum_correction=False, or leave the momentum alone"
            )
        self._check_all_exchanged()
        with self.stats.timed("optimizer"):
            self.inner.step()
        return loss

    def _check_all_exchanged(self) -> None:
        """Refuse gradients that this rank would apply alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in self._exchanged:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(parameter.shape)} has a gradient but did not "
                        f"require one, or was not there, when the DistributedOptimizer was made; "
                        f"make it anew after unfreezing or adding parameters"
                    )

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            if parameter.grad.is_sparse:
                raise TypeError(
                    f"{name} has a sparse gradient, which is not exchanged yet; "
                    f"build its layer with sparse=False"
                )
            self._num_backward[name] += 1
            if self._num_backward[name] > self.micro_batches_per_step or self._is_synchronized:
                raise RuntimeError(
                    f"{name} got a gradient {self._num_backward[name]} times without a step(); "
                    f"micro_batches_per_step is {self.micro_batches_per_step}"
                )
            if self._num_backward[name] == self.micro_batches_per_step and not self._clips_globally:
                self._send(name, None)

        return on_gradient

    def _send(self, name: str, scale: Tensor | None) -> None:
        """Clip this rank's gradient, hand it to the exchange and give its memory up."""
        parameter = self._named[name]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if self.compression.clip_norm is not None and scale is None:
            scale = self._clip_scale(torch.linalg.vector_norm(grad.float()))
        grad_N = grad.detach().reshape(-1)
        self._exchange.add(name, grad_N if scale is None else grad_N * scale)
        parameter.grad = None

    @property
    def _clips_globally(self) -> bool:
        return self.compression.clip_norm is not None and self.compression.clip_scope == "global"

    def _global_clip_scale(self) -> Tensor | None:
        """Return what to multiply all gradients with; None where each is clipped by itself."""
        if not self._clips_globally:
            return None
        grads = [p.grad for p in self._named.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad.float()) for grad in grads]
        device = next(iter(self._named.values())).device
        total = torch.stack([n.to(device) for n in norms] or [torch.zeros((), device=device)])
        return self._clip_scale(torch.linalg.vector_norm(total))

    def _clip_scale(self, norm: Tensor) -> Tensor:
        """Return min(1, threshold / norm), with the threshold of one worker (see Compression)."""
        num_parts = self.comm.world_size
        if self.compression.clip_scope == "tensor":
            num_parts *= len(self._named)
        threshold = self.compression.clip_norm / math.sqrt(num_parts)
        return (threshold / norm.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1)


def _take_over_momentum(optimizer: Optimizer, compression: Compression) -> Compensation:
    """Move SGD's momentum, if it has one, from the optimizer into the correction."""
    if not compression.momentum_correction or not isinstance(optimizer, SGD):
        return Compensation()
    groups = optimizer.param_groups
    settings = {(group["momentum"], group["nesterov"]) for group in groups}
    if len(settings) > 1 or any(group["dampening"] for group in groups):
        raise ValueError(
            f"momentum correction needs one momentum for all parameters and no dampening; "
            f"(momentum, nesterov) here: {sorted(settings)}"
        )
    momentum, nesterov = settings.pop()
    for group in groups:
        group["momentum"], group["nesterov"] = 0.0, False
        group["weight_decay"] /= 1 - momentum
    return Compensation(momentum, nesterov, compression.mask_velocity)
