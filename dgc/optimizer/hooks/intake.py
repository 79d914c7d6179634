"""Gradients on their way to the exchange: from autograd, or from `p.grad` where a person put them.

Owns: the hooks on the parameters, micro-batches, when gradients are clipped and unscaled, that
their memory is given up, and that zero_grad() can drop them as long as they have not left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from dgc.exchange.exchange import Exchange
from dgc.optimizer.hooks.handed_over import HandedOver
from dgc.optimizer.hooks.ownership import is_sole_owner
from dgc.worker.elements import element_dtype, flattened, to_reals
from dgc.worker.scaling import Scaling


class Intake:
    """Takes one rank's gradients as backward finishes them; with a global norm, when it is shut.

    Whatever is in `p.grad` when it is shut is this rank's gradient, as torch's optimizers have it,
    whoever put it there. Autograd runs the hooks of several devices in several threads: one lock
    lets them in one by one, and buckets leave in the same order all the same.

    first: what the first step tells of the gradients; None once all ranks know it.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        row_sparse: Collection[str],
        exchange: Exchange,
        scaling: Scaling,
        num_parts: int,
    ) -> None:
        self._named, self.row_sparse = named, row_sparse
        self._exchange, self._scaling, self.num_parts = exchange, scaling, num_parts
        self.first: FirstStep | None = FirstStep()
        self._is_open = True
        self._lock = threading.RLock()
        self._stand_ins: dict[str, HandedOver] = {}
        self._standing: set[str] = set()  # names of parameters with a stand-in in p.grad
        self.count_anew()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(
                torch.compiler.disable(self._make_hook(name))
            )
            for name, parameter in named.items()
        ]

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.clear()

    def takes(self, parameter: Tensor) -> bool:
        """Tell whether this parameter's gradients come here."""
        return bool(self._hooks) and any(parameter is mine for mine in self._named.values())

    def open(self) -> None:
        """Take the gradients of another step; what this one left in `p.grad` is known again."""
        with self._lock:
            self._is_open = True
            for name, parameter in self._named.items():
                grad = parameter.grad
                if grad is None or self._exchange.returns_gradients(name) or grad.is_inference():
                    continue
                grad._updates_at = grad._version

    def shut(self) -> None:
        """Hand over what is still here, and take back what zero_grad() has dropped.

        A tensor without a gradient counts as zero, but rests if it is frozen.
        """
        with self._lock:
            self._take_back_dropped()
            self.clear()
            if self._scaling.clips_globally:
                self._take_all()
            else:
                self._take_by_hand()
            for name in self._exchange.incomplete_names():
                self._exchange.complete(name, rests=not self._named[name].requires_grad)
            self.count_anew()
            self._is_open = False

    def count_anew(self) -> None:
        with self._lock:
            self._num_backward = dict.fromkeys(self._named, 0)

    def clear(self) -> None:
        """Leave nothing in `p.grad` that stands for a gradient."""
        with self._lock:
            for name in self._standing:
                if isinstance(self._named[name].grad, HandedOver):
                    self._named[name].grad = None
            self._standing.clear()

    def drop_all(self) -> None:
        """Forget this step's gradients, none of which has left."""
        with self._lock:
            for name in self._named if self._exchange.is_under_way else ():
                self._exchange.drop(name)
            self.clear()
            self.count_anew()

    # ---- from backward ---------------------------------------------------------------------------

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            with self._lock:
                if name in self._standing:
                    self._lift(name, parameter)
                self._on_gradient(name, parameter)

        return on_gradient

    def _lift(self, name: str, parameter: Tensor) -> None:
        """Put the gradient that has come into the stand-in's place; forget the one for which that
        stood, if zero_grad() has dropped it since."""
        self._standing.discard(name)
        stand_in = self._stand_ins[name]
        if stand_in.added is None or stand_in.is_dropped:
            self._drop(name)
        if parameter.grad is stand_in:
            parameter.grad = stand_in.added
        stand_in.added = None

    def _drop(self, name: str) -> bool:
        is_dropped = self._exchange.drop(name)
        if is_dropped:
            self._num_backward[name] = 0
        return is_dropped

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        if self.first is not None and self._is_found_sparse(name, parameter):
            return
        self._check_layout(name, parameter.grad)
        self._num_backward[name] += 1
        count, parts = self._num_backward[name], self.num_parts
        if count > parts or not self._is_open:
            self._refuse(name, parameter, count)
        # Here, so that it is not done twice: for the norm, and for the exchange.
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        if not self._scaling.clips_globally:
            self._take(name, self._scale(parameter.grad, parts), parts, count == parts)
            self._stand_in(name, parameter)
            if count == parts:
                self._exchange.complete(name)

    def _stand_in(self, name: str, parameter: Tensor) -> None:
        stand_in = self._stand_ins.get(name)
        if stand_in is None:
            stand_in = self._stand_ins[name] = HandedOver(name, parameter)
        parameter.grad = stand_in.renew()
        self._standing.add(name)

    def _is_found_sparse(self, name: str, parameter: Tensor) -> bool:
        """Note when the gradient came; tell whether it is sparse though it was not named.

        Such a gradient stays in `p.grad` until all ranks know of it."""
        self.first.order[name] = None
        if name in self.row_sparse or not parameter.grad.is_sparse:
            return False
        parameter.grad = parameter.grad.coalesce()
        self.first.rows.add(name)
        return True

    def _refuse(self, name: str, parameter: Tensor, count: int) -> None:
        if not self._scaling.clips_globally:  # nothing else is in p.grad
            parameter.grad = None
        raise RuntimeError(
            f"{name} got a gradient {count} times without a step(); micro_batches_per_step is "
            f"{self.num_parts}. A module that is used more than once under reentrant checkpointing "
            f"gives its gradient each time: torch.utils.checkpoint.checkpoint(..., "
            f"use_reentrant=False). To give up a step: abandon_step()"
        )

    def _check_layout(self, name: str, grad: Tensor) -> None:
        is_sparse = grad.is_sparse
        if is_sparse != (name in self.row_sparse):
            kind, remedy = ("sparse", "name it") if is_sparse else ("dense", "do not name it")
            raise TypeError(
                f"{name} has a {kind} gradient; {remedy} in row_sparse of the "
                f"DistributedOptimizer (row_sparse_names(model) finds them)"
            )

    def _scale(self, grad: Tensor, num_parts: int) -> Tensor | None:
        return self._scaling.of_tensor(_values(grad), num_parts) if self._scaling.scales else None

    def _take(self, name: str, scale: Tensor | None, num_parts: int, is_last: bool = True) -> None:
        """Hand this rank's gradient to the exchange and give its memory up."""
        parameter = self._named[name]
        grad, parameter.grad = parameter.grad, None
        if grad.is_sparse:
            self._exchange.add_rows(name, grad.detach(), scale)
            return
        # Tensors of inference mode cannot be written later, as the residual would be.
        may_keep = is_sole_owner(grad) and not grad.is_inference()
        grad_N = flattened(grad.detach())
        if not (may_keep or grad.is_contiguous()):  # if flattening made a copy, that one is ours
            may_keep = grad_N.data_ptr() != grad.data_ptr()
        del grad
        self._exchange.add(name, grad_N, scale, num_parts, is_last, may_keep)

    # ---- from p.grad -----------------------------------------------------------------------------

    def _is_dropped(self, name: str) -> bool:
        grad = self._named[name].grad
        return grad is None or getattr(grad, "is_dropped", False)

    def _take_back_dropped(self) -> None:
        """Forget gradients that zero_grad() has dropped, or that others in `p.grad` replace; where
        all are dropped, make all ranks undo the step.

        Raises: RuntimeError if only some are dropped, and have left.
        """
        dropped = [name for name in self._standing if self._is_dropped(name)]
        replaced = [n for n in self._standing if not isinstance(self._named[n].grad, HandedOver)]
        if dropped and len(dropped) == len(self._standing):
            self._exchange.spoil()
            return
        left = [n for n in {*dropped, *replaced} if not self._drop(n) and n in dropped]
        if left:
            raise RuntimeError(
                f"zero_grad() dropped the gradient of {left[0]} after backward(), when it had left "
                f"for the other ranks. Keep these parameters out of that backward pass "
                f"(requires_grad_(False) meanwhile, backward(inputs=...), torch.autograd.grad), "
                f"give up the step with abandon_step(), or let gradients stay in p.grad until "
                f"step(): Compression(clip_norm=math.inf, clip_scope='global')"
            )

    def _take_by_hand(self) -> None:
        """Take what is in `p.grad` though no backward of this step put it there: all of the step's.

        Raises: RuntimeError for what was put there after backward, whose gradient has left.
        """
        for name, parameter in self._named.items():
            if parameter.grad is None or self._is_update(name):
                continue
            self._check_layout(name, parameter.grad)
            if self._num_backward[name] == 0:
                self._take(name, self._scale(parameter.grad, 1), 1)
            elif _values(parameter.grad).any():
                raise RuntimeError(
                    f"p.grad of {name} was set after backward(), which had given this step's "
                    f"gradient to the exchange already; set it without a backward() before (from "
                    f"torch.autograd.grad), or let gradients stay in p.grad until step() by "
                    f"Compression(clip_norm=..., clip_scope='global'), clip_norm=math.inf for no "
                    f"clipping"
                )

    def _take_all(self) -> None:
        """Hand over all gradients, clipped by their joint norm."""
        mine = [name for name, p in self._named.items() if p.grad is not None]
        mine = [name for name in mine if not self._is_update(name)]
        for name in mine:
            self._check_layout(name, self._named[name].grad)
        if mine:
            scale = self._scaling.of_all([_values(self._named[name].grad) for name in mine])
            for name in mine:  # one by one, so that each gradient's memory is freed before the next
                parameter = self._named[name]
                self._take(name, scale.to(parameter.device, element_dtype(parameter)), 1)

    def _is_update(self, name: str) -> bool:
        """Tell whether `p.grad` is still what the step before left there, made of gradients but not
        their mean: to send it would be to count again what has been applied."""
        grad = self._named[name].grad
        updates_at = getattr(grad, "_updates_at", None)
        return updates_at is not None and updates_at == grad._version


class FirstStep:
    """What one rank's first backward tells: order, of names as their gradients first came; rows,
    the tensors whose gradients are sparse though they were not named."""

    def __init__(self) -> None:
        self.order: dict[str, None] = {}
        self.rows: set[str] = set()


def _values(grad: Tensor) -> Tensor:
    """Return what a gradient's norm is of."""
    grad = grad.detach()
    return to_reals(grad.coalesce().values() if grad.is_sparse else grad)
