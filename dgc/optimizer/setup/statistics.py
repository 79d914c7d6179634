"""Who does what: which second moments leave the optimizer for the workers.

Refuses what would act twice, or not at all, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from dgc.compression import Compression
from dgc.optimizer.apply import takes_elements
from dgc.optimizer.setup.momentum import holds
from dgc.wire.codec import entry_bits
from dgc.worker.elements import TensorSpec, element_dtype, num_elements
from dgc.worker.statistics import Preconditioner, Statistics


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


def is_compressible(parameter: Tensor, compression: Compression) -> bool:
    return parameter.dim() > 1 and parameter.numel() >= compression.min_numel


def delegate_statistics(
    optimizer: Optimizer, named: Mapping[str, Tensor], compression: Compression
) -> Statistics:
    """Take the second moments of compressible tensors over from the optimizer."""
    if compression.preconditioning == "after":
        return Statistics()
    found: dict[str, Preconditioner] = {}
    try:
        for name, parameter in named.items():
            if is_compressible(parameter, compression):
                preconditioner = optimizer.delegate_second_moment(parameter)
                if preconditioner is not None:
                    found[name] = preconditioner
    except ValueError:
        for name in found:
            optimizer.reclaim_second_moment(named[name])
        raise
    intervals: dict[str, int] = {}
    if compression.share_statistics:
        for name, preconditioner in found.items():
            intervals[name] = _share_interval(preconditioner, named[name], compression)
    return Statistics(found, intervals)


def row_sparse_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients will be sparse tensors."""
    found: dict[int, bool] = {}
    for module in model.modules():
        is_sparse = getattr(module, "sparse", False) is True
        for parameter in module.parameters(recurse=False):  # a tied weight's gradient is dense
            found[id(parameter)] = found.get(id(parameter), True) and is_sparse
    return [n for n, p in model.named_parameters() if found.get(id(p)) and p.requires_grad]


def make_specs(
    named: Mapping[str, Tensor],
    compression: Compression,
    row_sparse: Collection[str],
    slice_numel: Callable[[int], int],
    order: Iterable[str] = (),
) -> list[TensorSpec]:
    """Describe the tensors in the order in which backward finishes them.

    order: names, as far as that is known. Of others it is taken to be that of `named`, reversed.
    """
    known = {name: None for name in order if name in named}
    names = [*known, *(name for name in reversed(named) if name not in known)]
    return [
        TensorSpec(
            name,
            slice_numel(num_elements(p)),
            p.device,
            is_compressible(p, compression) and name not in row_sparse,
            num_elements(p),
            num_elements(p[0]) if name in row_sparse else 0,
            element_dtype(p),
        )
        for name, p in ((name, named[name]) for name in names)
    ]


def _share_interval(
    preconditioner: Preconditioner, parameter: Tensor, compression: Compression
) -> int:
    """Return after how many steps sharing adds no more than it may to the bytes of the entries."""
    num_bytes = sum(preconditioner.tensors[name].nbytes for name in preconditioner.shared_names)
    num_entries = math.ceil(parameter.numel() * compression.density)
    bits = entry_bits(compression.density, compression.value_dtype, compression.index_coding)
    allowed = compression.share_statistics * num_entries * bits / 8
    return max(1, math.ceil(min(num_bytes / allowed, 2**31)))
