"""Run dgc and optim on tensors without data, so that their use of memory can be followed.

In `without_data` the kernels only allocate what they would return, and functions whose result
depends on values return that of a step of the steady state: every gradient is finite, every
threshold finds the number of entries that it aims at, every message has its expected length.
Everything else is the code that trains, so that a prediction changes when that code does.
Not predicted: steps that look through a residual again, or put entries back because too many were
found. At a density of 0.1% these take nothing; at 1% up to 4% of the peak of a small model, at 10%
up to a quarter. Nor what plain torch allocates within a step in float64 when elements arrive or a
sketch is updated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import dgc.exchange.question
import dgc.exchange.selecting
import dgc.exchange.sparse_all_reduce
import dgc.selection.selector
from dgc.optimizer.replicas import Replicas
from dgc.selection.selector import Selector, Settling
from dgc.wire.codec import Codec
from dgc.wire.entries import Entries
from dgc.worker.taken import Taken
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.arguments import Room
from parsimony_kernels.buffers.host import threads_of
from parsimony_kernels.buffers.operands import Found, Pass, Report, Selection
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.runtime.operands import Table
from parsimony_kernels.step import ops as step
from parsimony_kernels.step import reference


@dataclass(frozen=True)
class _Aimed(Selection):
    """A selection with the number of entries that it aims at."""

    aim: int = 0


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Make kernels, and functions that read values, work on fake tensors. Not thread-safe."""
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "implementing_module", _implementing_module) for module in
          (step, buffers, packing)),
        *((module, "largest_indices", _largest_indices) for module in
          (dgc.selection.selector, dgc.exchange.selecting, dgc.exchange.sparse_all_reduce)),
        (buffers, "read_reports", _read_reports),
        (buffers, "split_reports", lambda found, _: _read_reports(found)),
        (dgc.exchange.question, "Download", _Download),
        (Selector, "selection", _selection),
        (Selector, "settling", _settling),
        (Selector, "num_leaving", _num_leaving),
        (Selector, "note", lambda *_: None),
        (Codec, "decode_one", _decode_one),
        (Codec, "decode_any", _decode_one),
        (Codec, "split_messages", _split_messages),
        (Codec, "split", _split),
        (dgc.exchange.sparse_all_reduce, "_pack_for_owners", _pack_for_owners),
        (Replicas, "check", lambda *_: None),
        (FakeTensor, "data_ptr", _data_ptr),
        (FakeTensor, "__deepcopy__", _copy),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(
                mock.patch.object(owner, name, stand_in, create=owner is FakeTensor)
            )
        yield


# ---- kernels -------------------------------------------------------------------------------------


def _accumulate(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    """Allocate what buffers/host.py or buffers/device.py does."""
    is_on_gpu = passes[0].device.type != "cpu"
    room = Room.of(passes, [1] * len(passes) if is_on_gpu else threads_of(passes))
    counts = [getattr(each.selection, "aim", 0) for each in passes]
    if is_on_gpu:
        founds = room.found(passes, room.lengths, is_sorted=False)
    else:
        founds = room.compacted(sum(counts)).found(passes, counts, is_sorted=True)
    for found, count in zip(founds, counts, strict=True):
        found.report._count = count
    return founds, room.report


def _merge(positions: Sequence[Tensor], values: Sequence[Tensor], dim: int) -> Any:
    """Allocate what a merge does; as many positions coincide as of random ones are expected to."""
    total = sum(part.numel() for part in positions)
    room = positions[0].new_empty(total)
    universe = getattr(positions[0], "_universe", 0) or math.inf
    missing = math.prod(1 - part.numel() / universe for part in positions)
    count = min(total, math.ceil(universe * (1 - missing))) if universe < math.inf else total
    positions_U = room[:count].clone()
    return positions_U, torch.zeros(count * dim, dtype=torch.float32, device=room.device)


_MODULES = {
    "step": SimpleNamespace(
        **dict.fromkeys(("sketch_insert", "sketch_update"), lambda *_: None),
        **dict.fromkeys(("step", "step_elements", "observe"), lambda *_: None),
        sqrt_=lambda x: x,
        roots=lambda asked, positions: torch.empty_like(positions, dtype=asked[0].tensor.dtype),
        sketch_query=lambda table, rows: rows.new_empty(
            len(rows), table.values.shape[2], dtype=table.values.dtype
        ),
        sketch_query_elements=lambda table, indices: torch.empty_like(
            indices, dtype=table.values.dtype
        ),
    ),
    "buffers": SimpleNamespace(accumulate=_accumulate, put=lambda *_: None),
    "packing": SimpleNamespace(
        round_values=lambda values_M, coding: torch.empty_like(values_M),
        pack=lambda *_: 0,
        merge=_merge,
    ),
}


def _unless_sketched(operation: Any) -> Any:
    """Return plain torch's operation, skipped for sketches, in which shapes depend on hashes."""
    return lambda *args: None if any(isinstance(x, Table) for x in args) else operation(*args)


def _observe_unless_sketched(given: Sequence[step.Observation]) -> None:
    reference.observe([one for one in given if not isinstance(one.observed.second, Table)])


_MODULE_OF_FLOAT64 = SimpleNamespace(
    **vars(_MODULES["step"])
    | {"step": _unless_sketched(reference.step), "observe": _observe_unless_sketched}
)


def _implementing_module(
    folder: str, device_type: str, dtype: torch.dtype = torch.float32
) -> ModuleType | SimpleNamespace:
    return _MODULE_OF_FLOAT64 if dtype == torch.float64 and folder == "step" else _MODULES[folder]


def _data_ptr(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # not 0, and equal for tensors that share memory


def _copy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Deep-copy as for a real tensor; torch's copy of a fake one copies its mode too, and leaks."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
    return memo[id(tensor)]


# ---- what depends on values ----------------------------------------------------------------------


def _read_reports(found: Sequence[Found]) -> list[Report]:
    return [Report(1.0, getattr(each.report, "_count", 0), None) for each in found]


def _selection(selector: Selector, threshold: float, step: int) -> Selection:
    return _Aimed(1.0, selector.plan.capacity, aim=selector.plan.k)


def _num_leaving(selector: Selector, report: Report) -> int | None:
    return None if selector.plan.is_exact else report.count


def _settling(
    selector: Selector,
    found: Found,
    report: Report,
    compensation: Any,
    name: str,
    num_nonzero: int | None = None,
) -> Settling:
    if selector.plan.is_exact:
        return selector.take_largest(compensation, name)
    return Taken(*found.entries(report.count))
    yield  # which makes this a generator


class _Download:
    """A copy to the host that is there at once, and is the same tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def has_come(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._tensor


def _largest_indices(magnitude_N: Tensor, k: int, num_nonzero: int | None = None) -> Tensor:
    """Allocate and free what the ranking of magnitudes does."""
    n = magnitude_N.numel()
    if k >= n:
        return magnitude_N.new_empty(n, dtype=torch.int64)
    largest = magnitude_N.topk(k, sorted=False)
    mask = magnitude_N > largest.values.min()
    above = magnitude_N.new_empty(k, dtype=torch.int64)
    del largest
    ties = magnitude_N == 0
    del mask, ties
    return torch.cat([above]).sort().values


def _decode_one(codec: Codec, message: Tensor) -> Entries:
    """Return as many entries as a message of this length has."""
    low, high = 0, codec.universe
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if codec.message_bytes(middle) <= message.numel() else (
            low, middle - 1)  # fmt: skip
    positions_K = message.new_empty(low, dtype=torch.int64)
    positions_K._universe = codec.universe
    return Entries(positions_K, message.new_empty(low * codec.dim, dtype=torch.float32), ())


def _split_messages(codec: Codec, gathered: Tensor, num_messages: int) -> list[Tensor]:
    return list(gathered.chunk(num_messages))


def _split(codec: Codec, positions_K: Tensor, values_M: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the entries of each tensor: as many as are its part of all elements."""
    if len(codec.names) == 1:
        return [(positions_K, values_M)]
    total, before, start, parts = sum(codec.numels), 0, 0, []
    for numel in codec.numels:
        before += numel
        end = positions_K.numel() * before // total
        parts.append((positions_K[start:end] - 0, values_M[start * codec.dim : end * codec.dim]))
        start = end
    return parts


def _pack_for_owners(bucket: Any, outgoing: Any, num_owners: int) -> tuple[list[Tensor], Tensor]:
    entries = outgoing.entries
    sent_K, parts = torch.empty_like(entries.values_M), []
    order = torch.empty_like(entries.positions_K), torch.empty_like(entries.positions_K)
    for owner, chosen in enumerate(order[0].chunk(num_owners)):
        codec = bucket.codec.of_owner(owner, num_owners)
        values = codec.round_values(torch.empty(chosen.shape, device=chosen.device))
        parts.append(codec.encode(chosen, values, entries.bad))
    return parts, sent_K
