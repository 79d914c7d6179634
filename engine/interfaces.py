"""What the engine asks of what it is handed: collectives, and an optimizer that exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


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
    """An optimizer whose `step` averages gradients over ranks. See dgc.optimizer."""

    inner: Any
    param_groups: list[dict[str, Any]]
    stats: StepStats

    def set_epoch(self, epoch: int) -> float:
        """Set and return the density of an epoch."""

    def explain(self) -> str:
        """Return a table of what is sent how."""

    def zero_grad(self) -> None: ...
    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def worker_state_dict(self) -> dict[str, Any]:
        """What only this rank has."""

    def load_worker_state_dict(self, state: dict[str, Any]) -> None: ...
    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes this rank keeps between steps, by kind."""
