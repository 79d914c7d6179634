"""What a DistributedOptimizer is made of, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dgc.compression import Compression
from dgc.optimizer.hooks.holding import check_free
from dgc.optimizer.setup.checks import (
    at_least_one,
    check_compression,
    check_optimizer,
    check_row_sparse,
    match_parameters,
)
from dgc.optimizer.setup.horovod_names import check_arguments, take_backward_passes
from dgc.optimizer.setup.options import resolve

DENSE = Compression(
    density=1.0, momentum_correction=False, preconditioning="after", two_level=False
)


@dataclass(frozen=True)
class Given:
    """named: name -> parameter. row_sparse: names of those whose gradients travel as rows."""

    named: dict[str, Tensor]
    compression: Compression
    micro_batches_per_step: int
    row_sparse: frozenset[str]


def check_given(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None,
    compression: Any,
    micro_batches_per_step: int,
    row_sparse: Collection[str],
    horovods: dict[str, Any],
) -> Given:
    """Return the arguments of a DistributedOptimizer as it takes them.

    Raises: ValueError or TypeError, as DistributedOptimizer says, before anything is changed.
    """
    micro_batches_per_step = take_backward_passes(horovods, micro_batches_per_step)
    check_arguments(horovods)
    check_optimizer(optimizer)
    named = match_parameters(optimizer, named_parameters)
    check_free(named)
    return Given(
        named,
        resolve(check_compression(compression) or DENSE, optimizer),
        row_sparse=check_row_sparse(row_sparse, named),
        micro_batches_per_step=at_least_one(micro_batches_per_step),
    )
