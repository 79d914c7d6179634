"""Clipping of the gradient that all ranks agreed on, dense or row-sparse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`.

    As torch.nn.utils.clip_grad_norm_, which takes no sparse gradients; these are coalesced here.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    if values:
        norm = torch.nn.utils.get_total_norm(values)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(values, scale)
