"""Go on with a run that another number of ranks has made, or ranks that were placed otherwise.

What is equal on all ranks is loaded as ever. Of what each rank had of its own, the sum or the mean
is taken over, and what its epoch has left is divided anew. Ranks that there were before keep their
random numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from engine.interfaces import Batches, Collectives
from engine.meters import add_seconds
from engine.replicas import batch_statistics
from engine.sampling import seed_all
from engine.state import RunState

_SMALL = ("train_sums", "position", "payload_bytes", "phase_seconds", "peak_memory_bytes", "random",
          "random_cuda")  # fmt: skip


def take_over(
    state: RunState,
    shared: dict[str, Any],
    parts: Iterable[tuple[int, dict[str, Any]]],
    *,
    comm: Collectives,
    batches: Batches,
    micro_batches: int,
    steps_per_epoch: int,
    seed: int,
) -> None:
    """Let this rank go on with its share. A collective.

    Args: shared: what is equal on all ranks; see RunState.shared.
        parts: (rank, RunState.worker of that rank) that this rank has read; over all ranks, each of
            the job before once.
        batches, micro_batches: to train on, and how many of them make a step.
    """
    state.restore_shared(shared)
    departed = _Departed(state, parts)
    state.optimizer.load_worker_states(departed.exchanges())
    ranks = departed.all_of(comm)
    _share(state, ranks, comm.rank)
    if comm.rank < len(ranks):
        state.restore_random(ranks[comm.rank])
    else:
        new_seed = hash((seed, comm.rank, state.progress.step)) & 0x7FFFFFFFFFFFFFFF
        torch.manual_seed(new_seed)  # of GPUs too
        seed_all(new_seed)
    progress, state.carried, state.position = state.progress, None, {}
    num_steps = progress.epoch * steps_per_epoch
    if progress.step_in_epoch:
        first = progress.step_in_epoch * micro_batches
        positions = [rank["position"] for rank in ranks]
        state.position = batches.take_over(progress.epoch, first, positions)
        num_steps += steps_per_epoch - batches.num_left(first, state.position) // micro_batches
    state.learning_rate.take_over(shared["learning_rate"], num_steps)


def _share(state: RunState, ranks: list[dict[str, Any]], rank: int) -> None:
    """Take over sums and means of what the ranks before had; rank 0 the task's sums."""
    for name, buffer in batch_statistics(state.model).items():
        theirs = torch.stack([part["statistics"][name].double() for part in ranks])
        buffer.copy_(theirs.mean(0))
    state.train_sums.values.zero_()
    for part in ranks if rank == 0 else ():
        state.train_sums.add(part["train_sums"].to(state.device))
    progress = state.progress
    progress.payload_bytes = sum(part["payload_bytes"] for part in ranks) // len(ranks)
    progress.peak_memory_bytes = max(part["peak_memory_bytes"] for part in ranks)
    progress.phase_seconds = {}
    for part in ranks:
        for phase, seconds in part["phase_seconds"].items():
            add_seconds(progress.phase_seconds, phase, seconds / len(ranks))


class _Departed:
    """What this rank has read of the ranks before: their small parts are kept."""

    def __init__(self, state: RunState, parts: Iterable[tuple[int, dict[str, Any]]]) -> None:
        self._parts, self._names = parts, list(batch_statistics(state.model))
        self._small: dict[int, dict[str, Any]] = {}

    def exchanges(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (rank, what its optimizer kept) of each, of which nothing else is held then."""
        for rank, part in self._parts:
            small = {name: part[name] for name in _SMALL if name in part}
            small["statistics"] = {name: part["buffers"][name] for name in self._names}
            small.setdefault("position", {})
            self._small[rank] = small
            yield rank, part["exchange"]

    def all_of(self, comm: Collectives) -> list[dict[str, Any]]:
        """Return the small parts of all ranks of the job before, in their order. A collective."""
        everyone: dict[int, dict[str, Any]] = {}
        for some in comm.all_gather_object(self._small):
            everyone |= some
        return [everyone[rank] for rank in sorted(everyone)]
