"""Measure the memory that torch's allocator gives out in real steps.

On a GPU by the allocator's own counters. On a CPU by the memory events of torch.profiler, which
show the blocks that were allocated while it ran; blocks from before are counted from the tensors
that hold them. Neither shows what C++ code allocates without torch's allocator: oneDNN's reordered
weights, a kernel's small lists, Horovod's buffers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

from memory.tracker import parts_of

_STEP = "parsimony.memory.step"


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank in real steps.

    peak_bytes: the most that was allocated at any moment of the steps after the first.
    kept: kind -> bytes after the last step, with the kinds of engine.state.RunState.state_bytes.
    how: what measured the peak.
    """

    peak_bytes: int
    kept: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    how: str = ""


def measure(
    step: Callable[[], Any],
    *,
    device: torch.device,
    held: Callable[[], Iterable[Any]],
    kept: Callable[[], dict[str, int]] = dict,
    num_steps: int = 3,
) -> Measured:
    """Run real steps and read the allocator.

    Args:
        step: makes one whole step.
        held: returns the tensors that live between steps (see `held_by`).
        kept: returns their bytes by kind, for the result.
        num_steps: 2 or more; the first one makes state and is not measured.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; allowed: 2 or more, as the first makes state")
    if device.type == "cuda":
        step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(num_steps - 1):
            step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Measured(peak, kept(), num_steps, "torch.cuda.max_memory_allocated")
    return Measured(_peak_on_cpu(step, held, num_steps), kept(), num_steps, "torch.profiler")


def held_by(model: nn.Module, optimizer: Any, *others: Any) -> list[Tensor]:
    """Return the tensors that live between steps: of the model, the optimizer and other values."""
    worker = getattr(optimizer, "worker_state_dict", dict)()
    values = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    values += tree_leaves([list(dict(optimizer.state).values()), worker, list(others)])
    return [part for value in values for part in parts_of(value)]


def _peak_on_cpu(step: Callable[[], Any], held: Callable[[], Iterable[Any]], num_steps: int) -> int:
    gc.collect()  # garbage from before the steps, if freed within them, would lower their peak
    before = {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in map(_storage, held())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        step()
        stayed = sum(size for alive, size in before.values() if not alive.expired())
        for _ in range(num_steps - 1):
            with record_function(_STEP):
                step()
    events = prof.profiler.kineto_results.events()
    steps = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == _STEP]
    first, last = min(begin for begin, _ in steps), max(end for _, end in steps)
    live = peak = 0
    changes = [(e.start_ns(), e.nbytes()) for e in events
               if e.name() == "[memory]" and e.device_type().name == "CPU"]  # fmt: skip
    for when, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        if when <= last:
            peak = live if when < first else max(peak, live)
    return stayed + peak


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
