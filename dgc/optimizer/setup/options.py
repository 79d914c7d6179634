"""Whether the options of the optimizer and those of Compression go together.

Refuses what would act twice, or not at all, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from dgc.compression import Compression
from dgc.optimizer.apply import takes_elements
from dgc.optimizer.setup.momentum import holds


def resolve(compression: Compression, optimizer: Optimizer) -> Compression:
    """Return the settings with `preconditioning` decided.

    Raises: ValueError for settings that this optimizer cannot follow.
    """
    where, name = compression.preconditioning, type(optimizer).__name__
    can_delegate = getattr(optimizer, "has_second_moment", False)
    if where in ("late", "early") and not can_delegate:
        raise ValueError(
            f"preconditioning is {where!r}, but {name} has no second moment that it could hand "
            f"over; use an optimizer of optim (such as FactoredAdam), or preconditioning='after'"
        )
    where = where or ("late" if can_delegate else "after")
    if where == "after" and compression.update_scale != 1 and not isinstance(optimizer, SGD):
        raise ValueError(
            f"update_scale is {compression.update_scale}, but with preconditioning='after' {name} "
            f"divides it out again; leave it at 1, and set lr"
        )
    for setting, default in (("select_by", "raw"), ("share_statistics", 0.0)):
        value = getattr(compression, setting)
        if value != default and where == "after":
            raise ValueError(
                f"{setting} is {value!r}, which needs statistics of the workers; with "
                f"preconditioning='after', or {name}, there are none: leave it at {default!r}"
            )
    return dataclasses.replace(compression, preconditioning=where)


def check_groups(
    optimizer: Optimizer, compression: Compression, row_sparse: Sequence[Tensor] = ()
) -> None:
    """Refuse options that do not go with the exchange, also where they were set since.

    Raises: ValueError for weight decay that would only reach what arrives, or that SGD cannot apply
        to rows.
    """
    _check_rows(optimizer, row_sparse)
    if compression.density == 1 or not takes_elements(optimizer) or optimizer.has_first_moment:
        return
    for group in optimizer.param_groups:
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"weight_decay is {group['weight_decay']} and acts within the gradient, of which "
                f"few entries arrive; set decoupled_weight_decay=True"
            )


def _check_rows(optimizer: Optimizer, row_sparse: Sequence[Tensor]) -> None:
    """Refuse torch's optimizers that would themselves refuse rows, in their first step."""
    if not row_sparse:
        return
    is_torchs = type(optimizer).__module__.startswith("torch.optim")
    if is_torchs and not isinstance(optimizer, (SGD, SparseAdam, Adagrad)):
        raise ValueError(
            f"there are row-sparse gradients, which torch's {type(optimizer).__name__} does not "
            f"take; take one of optim (configs/optim/lazy_adam.py, momentum.py, sketch_adam.py, "
            f"sm3.py), SGD or SparseAdam, or sparse=False"
        )
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["weight_decay"] and holds(group, row_sparse):
            raise ValueError(
                f"weight_decay is {group['weight_decay']} for a row-sparse parameter, to whose "
                f"rows torch.optim.SGD cannot add it; give it a group with weight_decay=0, or take "
                f"an optimizer of optim"
            )
