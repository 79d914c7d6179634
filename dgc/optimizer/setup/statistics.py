"""Which second moments the workers take over from the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from dgc.compression import Compression
from dgc.wire.entries import entry_bits
from dgc.worker.statistics import Preconditioner, Statistics


def delegate_statistics(
    optimizer: Optimizer, named: Mapping[str, Tensor], compression: Compression
) -> Statistics:
    """Take the second moments of compressible tensors over from the optimizer."""
    if compression.preconditioning == "after":
        return Statistics()
    found: dict[str, Preconditioner] = {}
    try:
        for name, parameter in named.items():
            if compression.is_compressible(parameter):
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


def _share_interval(
    preconditioner: Preconditioner, parameter: Tensor, compression: Compression
) -> int:
    """Return after how many steps sharing adds no more than it may to the bytes of the entries."""
    num_bytes = sum(preconditioner.tensors[name].nbytes for name in preconditioner.shared_names)
    num_entries = math.ceil(parameter.numel() * compression.density)
    bits = entry_bits(compression.density, compression.value_dtype, compression.index_coding)
    allowed = compression.share_statistics * num_entries * bits / 8
    return max(1, math.ceil(min(num_bytes / allowed, 2**31)))
