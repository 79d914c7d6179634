"""Gradients on their way from autograd to the exchange.

Owns: the hooks on the parameters, micro-batches, when gradients are clipped and unscaled, and that
their memory is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from dgc.exchange import Exchange
from dgc.ownership import is_sole_owner
from dgc.scaling import Scaling
from kernels.operands import PARAMETER_DTYPES


class Intake:
    """Takes one rank's gradients as backward finishes them; with a global norm, when it is shut."""

    def __init__(
        self,
        named: Mapping[str, Tensor],
        row_sparse: Collection[str],
        exchange: Exchange,
        scaling: Scaling,
        num_parts: int,
    ) -> None:
        self._named, self._row_sparse = named, row_sparse
        self._exchange, self._scaling, self._num_parts = exchange, scaling, num_parts
        self._is_open = True
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

    def takes(self, parameter: Tensor) -> bool:
        """Tell whether this parameter's gradients come here."""
        return bool(self._hooks) and any(parameter is mine for mine in self._named.values())

    def open(self) -> None:
        """Take the gradients of another step."""
        self._is_open = True

    def shut(self) -> None:
        """Hand over what is still here; a tensor without a gradient counts as zero."""
        if self._scaling.clips_globally:
            self._take_all()
        for name in self._exchange.open_names():
            self._exchange.close(name)
        self.count_anew()
        self._is_open = False

    def count_anew(self) -> None:
        self._num_backward = dict.fromkeys(self._named, 0)

    def _make_hook(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            if parameter.grad.is_sparse != (name in self._row_sparse):
                kind, remedy = ("sparse", "name it") if parameter.grad.is_sparse else (
                    "dense", "do not name it")  # fmt: skip
                raise TypeError(
                    f"{name} has a {kind} gradient; {remedy} in row_sparse of the "
                    f"DistributedOptimizer (row_sparse_names(model) finds them)"
                )
            self._num_backward[name] += 1
            count, parts = self._num_backward[name], self._num_parts
            if count > parts or not self._is_open:
                raise RuntimeError(
                    f"{name} got a gradient {count} times without a step(); "
                    f"micro_batches_per_step is {parts}"
                )
            if parameter.grad.is_sparse:  # once, for its norm and for the exchange
                parameter.grad = parameter.grad.coalesce()
            if not self._scaling.clips_globally:
                scale = self._scaling.of_tensor(_values(parameter.grad))
                self._take(name, scale, parts, count == parts)
                if count == parts:
                    self._exchange.close(name)

        return on_gradient

    def _take(self, name: str, scale: Tensor | None, num_parts: int, is_last: bool = True) -> None:
        """Hand this rank's gradient to the exchange and give its memory up."""
        parameter = self._named[name]
        grad, parameter.grad = parameter.grad, None
        if grad.is_sparse:
            self._exchange.add_rows(name, grad.detach(), scale)
            return
        may_keep = is_sole_owner(grad)
        grad_N = grad.detach().reshape(-1)
        del grad
        if grad_N.dtype not in PARAMETER_DTYPES:
            grad_N = grad_N.float()
        self._exchange.add(name, grad_N, scale, num_parts, is_last, may_keep)

    def _take_all(self) -> None:
        """Hand over all gradients, clipped by their joint norm."""
        with_grad = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        if with_grad:
            scale = self._scaling.of_all([_values(grad) for grad in with_grad.values()])
            for name in list(with_grad):  # each gradient is given up in its turn
                self._take(name, scale.to(with_grad.pop(name).device), 1)


def _values(grad: Tensor) -> Tensor:
    """Return what a gradient's norm is of."""
    return grad.values() if grad.is_sparse else grad
