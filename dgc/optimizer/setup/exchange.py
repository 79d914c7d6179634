"""The exchange of a DistributedOptimizer, with what is taken over from the inner optimizer."""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer

from dgc.comm.interface import Comm
from dgc.comm.topology import choose_islands
from dgc.exchange.exchange import Exchange
from dgc.optimizer.setup.checks import check_same_everywhere, refuse_capture
from dgc.optimizer.setup.given import Given
from dgc.optimizer.setup.momentum import MARK, Momentum
from dgc.optimizer.setup.options import check_groups
from dgc.optimizer.setup.statistics import delegate_statistics
from dgc.worker.residual import Compensation


def make_alike_everywhere(
    comm: Comm, given: Given, bucket_bytes: int | None, has_scaler: bool
) -> None:
    """Refuse ranks that were given something else; give rank 0's parameters to all."""
    settings = (given.compression, given.micro_batches_per_step, bucket_bytes,
                sorted(given.row_sparse), has_scaler)  # fmt: skip
    check_same_everywhere(comm, given.named, settings)
    for name, parameter in given.named.items():
        comm.broadcast(parameter.detach(), f"initial.{name}")


def make_exchange(
    comm: Comm, optimizer: Optimizer, given: Given, seed: int
) -> tuple[Momentum, Exchange]:
    """Take momentum and second moments over from the optimizer; make what uses them."""
    compression = given.compression
    optimizer.state.pop(MARK, None)
    momentum = Momentum(optimizer, compression, given.named, given.row_sparse)
    compensation = Compensation(
        *momentum.now(), compression.mask_velocity, compression.residual_dtype,
        compression.velocity_dtype, seed + comm.rank, momentum.is_sgds,
    )  # fmt: skip
    check_groups(optimizer, compression, [given.named[name] for name in sorted(given.row_sparse)])
    dense = {name: p for name, p in given.named.items() if name not in given.row_sparse}
    islands = choose_islands(comm, compression)
    statistics = delegate_statistics(optimizer, dense, compression)
    exchange = Exchange(comm, compression, compensation, statistics, islands)
    exchange.before_step = partial(_begin_step, momentum, exchange)
    return momentum, exchange


def _begin_step(momentum: Momentum, exchange: Exchange) -> None:
    refuse_capture(exchange.buckets[0].specs[0].device)
    momentum.begin_step(exchange)
