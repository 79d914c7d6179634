"""Hand what the ranks agreed on to the optimizer that is held: as entries, or as `p.grad`.

An optimizer of `optim` without a first moment takes entries. torch.optim.SGD without momentum needs
nothing but them either, and they are applied for it. Any other finds the whole tensor, zeros
included, in `p.grad`: a first moment moves parameters also where nothing arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dgc.exchange.update import Update
from dgc.wire.entries import Entries
from dgc.worker.elements import gradient_of, num_elements, row_gradient_of
from parsimony_kernels.runtime.checks import trusted_positions
from parsimony_kernels.runtime.operands import STEP_DTYPES
from parsimony_kernels.step import ops


def hand_over(
    optimizer: Optimizer, named: Mapping[str, Tensor], update: Update
) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """Put what must be dense into `p.grad`; return parameter -> (indices, values) of the rest."""
    elements = {}
    wants_entries = _wants_entries(optimizer)
    for name in named.keys() - update.dense.keys() - update.rows.keys():
        named[name].grad = None  # of an earlier step, if it was not set to none
    for name, mean_N in update.dense.items():
        named[name].grad = gradient_of(named[name], mean_N)
    for name, (rows_K, means_KM) in update.rows.items():
        named[name].grad = row_gradient_of(named[name], rows_K, means_KM)
    for name, mean in update.sparse.items():
        parameter = named[name]
        if wants_entries and parameter.dtype in STEP_DTYPES:
            elements[parameter] = (mean.positions_K, mean.values_M)
        else:
            parameter.grad = gradient_of(parameter, _densify(mean, num_elements(parameter)))
    return elements


def step(optimizer: Optimizer, elements: Mapping[Tensor, tuple[Tensor, Tensor]]) -> None:
    """Step the optimizer on the `p.grad`s that are there and on the elements.

    Those, and the rows of sparse gradients, were checked when their messages were read.
    """
    if takes_elements(optimizer):
        with trusted_positions():
            optimizer.step(elements=elements)
        return
    with torch.no_grad(), trusted_positions():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in elements:
                    _step_sgd(group, parameter, *elements[parameter])
    optimizer.step()


def takes_elements(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer is one of `optim`, whose `step` has that argument."""
    return hasattr(optimizer, "delegate_second_moment")


def _wants_entries(optimizer: Optimizer) -> bool:
    if takes_elements(optimizer):
        return not optimizer.has_first_moment
    return type(optimizer) is SGD and not any(g["momentum"] for g in optimizer.param_groups)


def _step_sgd(
    group: dict[str, Any], parameter: Tensor, indices_K: Tensor, values_K: Tensor
) -> None:
    """Do what SGD without momentum does with a gradient that is 0 elsewhere."""
    lr = float(group["lr"])
    if group["weight_decay"]:
        parameter.mul_(1 - lr * group["weight_decay"])
    target = parameter.contiguous()
    rule = ops.Rule(lr, sign=-1.0 if group["maximize"] else 1.0)
    ops.step_elements(target.view(1, -1), values_K, indices_K, rule)
    if target.data_ptr() != parameter.data_ptr():
        parameter.copy_(target)
    torch.autograd.graph.increment_version(parameter)  # kernels write behind autograd's back


def _densify(mean: Entries, numel: int) -> Tensor:
    dense_N = torch.zeros(numel, dtype=mean.values_M.dtype, device=mean.values_M.device)
    dense_N[mean.positions_K] = mean.values_M
    return dense_N
