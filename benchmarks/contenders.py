"""The optimizers that the scripts here compare, by name: ours, torch's, and rivals of both.

Also the bytes of an optimizer's state, and the time of a piece of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.rivals import RIVALS, MakeOptimizer
from optim import (
    SM3,
    Adam,
    FactoredAdam,
    SketchAdagrad,
    SketchAdam,
    SketchMomentum,
    SketchRMSprop,
    SM3Adam,
)

BASELINE = "Adam"  # times are given as multiples of its time


def _of(kind: type[Optimizer], **settings: Any) -> MakeOptimizer:
    return lambda params, lr: kind(params, lr=lr, **settings)


TORCH: dict[str, MakeOptimizer] = {
    BASELINE: _of(torch.optim.Adam, fused=True),
    "momentum": _of(torch.optim.SGD, momentum=0.9, fused=True),
}

NO_FIRST = (0.0, 0.999)
OURS: dict[str, MakeOptimizer] = {
    "Adam, full, ours": _of(Adam),
    "SM3": _of(SM3),
    "SM3, momentum 0.9": _of(SM3, momentum=0.9),
    "SM3Adam": _of(SM3Adam),
    "SM3Adam, beta1 = 0": _of(SM3Adam, betas=NO_FIRST),
    "FactoredAdam": _of(FactoredAdam),
    "FactoredAdam, beta1 = 0": _of(FactoredAdam, betas=NO_FIRST),
    "CMS, beta1 = 0": _of(SketchAdam, betas=NO_FIRST),
    "CS-V": _of(SketchAdam, first_moment="full"),
    "CS-MV": _of(SketchAdam),
    "SketchRMSprop": _of(SketchRMSprop),
    "SketchAdagrad": _of(SketchAdagrad),
    "CS-momentum": _of(SketchMomentum, momentum=0.9),
}

ALL = TORCH | OURS | RIVALS


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state, also those inside of other objects."""
    seen: set[int] = set()
    pending: list[Any] = list(optimizer.state.values())
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, (list, tuple)):
            pending += item
        elif hasattr(item, "__dict__"):
            pending += vars(item).values()


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the state; a storage that several tensors share counts once."""
    storages = [tensor.untyped_storage() for tensor in state_tensors(optimizer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the time of one call; on a GPU by events of the stream."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)
