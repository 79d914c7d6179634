"""What the engine asks of the parts that it is handed, as protocols.

The parts are a run's settings, its task, its batches, the collectives and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Batch = Sequence[Tensor]
Carried = Any
"""State that the forward pass of one batch hands to that of the next, such as the state of a
recurrent network: tensors in tuples, without gradients. None at the start of an epoch, and for
tasks that carry no state."""


class TrainSettings(Protocol):
    """The engine's part of configs.schema.Train, which says what each setting means."""

    num_epochs: int
    micro_batches_per_step: int
    precision: str
    clip_norm: float | None
    best_metric: str


class CheckpointSettings(Protocol):
    """See configs.schema.Checkpoint."""

    every_epochs: int
    every_steps: int | None
    keep: int
    asynchronous: bool
    on_error: str


class ReportSettings(Protocol):
    """See configs.schema.Report."""

    every_steps: int


class RunSettings(Protocol):
    """The engine's part of configs.schema.Run."""

    train: TrainSettings
    checkpoint: CheckpointSettings
    report: ReportSettings
    seed: int
    dgc: Any
    """None: gradients are exchanged densely."""


class Task(Protocol):
    """What a model is trained for: the loss of a batch, and the metrics of many batches."""

    num_sums: int

    def __call__(
        self, model: nn.Module, batch: Batch, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried]:
        """Return the mean loss, (num_sums,) float64 sums over the batch, and the carried state.

        The sums carry no gradient. The engine adds up those of several batches, and of all ranks.
        """

    def metrics(self, sums: Sequence[float], split: str) -> dict[str, float]:
        """Return the metrics of a split ("train", "valid", "test") by name.

        Of metrics whose names begin with "loss" or "perplexity" the smaller value is better, of
        others the larger.
        """


class Batches(Protocol):
    """One rank's batches of one split; all ranks have the same number of them.

    A position says where a rank's next batch begins, as tensors and plain values. {}: at the batch
    whose number is `first`, of the whole epoch as this many ranks divide it.
    """

    num_batches: int
    """Batches of an epoch."""
    samples_per_batch: int
    """On this rank. A sample is what the split says: an image, or a text of so many words."""

    def start(self, epoch: int, first: int, position: Mapping[str, Any]) -> Iterator[Batch]:
        """Yield the batches of an epoch from a position to its end."""

    def num_left(self, first: int, position: Mapping[str, Any]) -> int:
        """Return how many batches follow a position."""

    def position(self) -> dict[str, Any]:
        """Return where the batch after the last one begins."""

    def take_over(
        self, epoch: int, first: int, positions: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return where this rank goes on in an epoch that another number of ranks began.

        What those had not seen is divided among the ranks of this job; what then does not fill a
        batch on every rank is left out.
        Args: first, positions: as the ranks of that job would have gone on, each at its own.
        """


class Split(Protocol):
    """A data set that makes its own batches. Other data sets are loaded sample by sample."""

    facts: Mapping[str, Any]
    """Values for arguments of the model that have these names, e.g. num_words."""

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
        """Return a rank's batches. Raises: ValueError if an epoch has less than one batch."""


class Handle(Protocol):
    def wait(self) -> Tensor: ...


class Collectives(Protocol):
    """The collectives that the engine calls, on all ranks in the same order. See dgc.comm."""

    rank: int
    world_size: int

    def all_reduce_async(self, tensor: Tensor, name: str) -> Handle: ...
    def broadcast(self, tensor: Tensor, name: str) -> None: ...
    def broadcast_object(self, value: Any) -> Any: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...


class StepStats(Protocol):
    """What one rank sent in a step, and the seconds that each phase of the step took."""

    payload_bytes: int
    bytes_by_kind: Mapping[str, int]
    hidden_share: float
    least_taken: Mapping[str, Tensor]
    """By tensor: the least magnitude that was sent; on its device."""
    num_selected: int
    num_selectable: int
    skipped: str | None
    """Why the step was undone on all ranks; None if it was not."""
    seconds: Mapping[str, float]


class ExchangingOptimizer(Protocol):
    """An optimizer whose `step` averages gradients over ranks. See dgc.optimizer.distributed."""

    inner: Any
    param_groups: list[dict[str, Any]]
    stats: StepStats

    def set_epoch(self, epoch: int) -> float:
        """Set the density for an epoch, and return it."""

    def explain(self) -> str:
        """Return a table that says how each bucket of gradients is sent."""

    def zero_grad(self) -> None: ...
    def clip_grad_norm_(self, max_norm: float) -> Any:
        """Bound the norm of the gradient averaged over ranks, in a dense exchange."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def worker_state_dict(self) -> dict[str, Any]:
        """Return the state that only this rank has."""

    def load_worker_state_dict(self, state: dict[str, Any]) -> None: ...
    def is_own_worker_state(self, state: Mapping[str, Any]) -> bool:
        """Tell whether `load_worker_state_dict` can take this up, as ranks are placed here."""

    def load_worker_states(self, states: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Go on from the workers of another job: (rank, state) of those that this rank has read."""

    def worker_state_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank keeps between steps, by kind."""
