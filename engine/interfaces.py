"""What the engine asks of what it is handed: a task, its batches, collectives, an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Sequence[Tensor]
Carried = Any
"""What the next batch's forward goes on from (a recurrent network's state): tensors in tuples,
without gradients; None at the start of an epoch, and for tasks that carry nothing."""


class Task(Protocol):
    """What a model is trained for: what a batch costs, and what is told of many."""

    num_sums: int

    def __call__(
        self, model: nn.Module, batch: Batch, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried]:
        """Return the mean loss, (num_sums,) float64 sums over the batch, and what goes on.

        Sums of several batches, and of all ranks, are added; they carry no gradient.
        """

    def metrics(self, sums: Sequence[float], split: str) -> dict[str, float]:
        """Return metrics of a split ("train", "valid", "test") by name. Those whose names begin
        with "loss" or "perplexity" are better the smaller, others the larger."""


class Batches(Protocol):
    """One rank's batches of one split, the same number on all ranks."""

    num_batches: int
    """Of an epoch."""
    samples_per_batch: int
    """On this rank; what a sample is, the split says: an image, or a text of so many words."""

    def start(self, epoch: int, first: int, position: Mapping[str, Any]) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `first` on.

        position: what `position` was when batch first - 1 had been handed out; {} if first is 0.
        """

    def position(self) -> dict[str, Any]:
        """Return, as tensors and plain values, where the next batch begins; {} where that follows
        from the epoch and the number of the batch."""


class Split(Protocol):
    """A data set that cuts its batches itself; others are loaded sample by sample."""

    facts: Mapping[str, Any]
    """What a model may ask for by the names of its arguments, e.g. num_words."""

    def batches(
        self,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        is_training: bool,
        samples_per_epoch: int | None,
    ) -> Batches:
        """Return a rank's batches. Raises: ValueError if an epoch holds less than one."""


class Handle(Protocol):
    def wait(self) -> Tensor: ...


class Comm(Protocol):
    """Collectives of one rank; all ranks call them alike. See dgc.comm."""

    rank: int
    world_size: int
    local_rank: int

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle: ...
    def broadcast(self, tensor: Tensor, name: str) -> None: ...
    def broadcast_object(self, value: Any) -> Any: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...


class StepStats(Protocol):
    """What one rank sent in a step, and the seconds of each phase of it."""

    payload_bytes: int
    bytes_by_kind: Mapping[str, int]
    hidden_share: float
    thresholds: Mapping[str, float]
    num_selected: int
    num_selectable: int
    skipped: str | None
    """Why the step was undone on all ranks; None: it was not."""
    seconds: Mapping[str, float]


class ExchangingOptimizer(Protocol):
    """An optimizer whose `step` averages gradients over ranks. See dgc.optimizer.distributed."""

    inner: Any
    param_groups: list[dict[str, Any]]
    stats: StepStats

    def set_epoch(self, epoch: int) -> float:
        """Set and return the density of an epoch."""

    def explain(self) -> str:
        """Return a table of what is sent how."""

    def zero_grad(self) -> None: ...
    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Bound the norm of the mean gradient over ranks, where gradients travel densely."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has."""

    def load_worker_state_dict(self, state: dict[str, Any]) -> None: ...
    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes this rank keeps between steps, by kind."""
