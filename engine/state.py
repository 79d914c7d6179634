"""Everything that changes during a run: what a checkpoint holds and what result.json sums up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine import report
from engine.checkpoint import CheckpointError
from engine.interfaces import Carried, ExchangingOptimizer
from engine.meters import Sums, smaller_is_better
from engine.sampling import random_states, set_random_states
from engine.schedules import LearningRate


def polyak(decay: float) -> Callable[..., None]:
    """Return the function with which an AveragedModel takes in a step's parameters.

    average <- weight * average + (1 - weight) * parameters, where weight is `decay`, but in the
    n-th step at most (1 + n) / (10 + n), so that the initial parameters are soon forgotten.
    TensorFlow's ExponentialMovingAverage has the same rule.
    """

    def average(averaged: Any, current: Any, num_averaged: Any) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return average


def to_device(carried: Carried, device: torch.device) -> Carried:
    """Return the carried state, moved to a device."""
    if isinstance(carried, Tensor):
        return carried.to(device)
    if isinstance(carried, (tuple, list)):
        return type(carried)(to_device(part, device) for part in carried)
    return carried


def _is_better(name: str, value: float, than: float) -> bool:
    """Tell whether a value of a metric is better than another; any value is better than NaN."""
    if math.isnan(than):
        return True
    return value < than if smaller_is_better(name) else value > than


@dataclass
class Progress:
    """How far a run has come, in plain values."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    examples: int = 0
    """Trained on so far, by all ranks."""
    payload_bytes: int = 0
    """Sent so far by this rank."""
    skipped_steps: int = 0
    """Steps, counted in `step` too, that all ranks undid because a gradient was not finite."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Of this rank, by phase. The phases of the exchange lie within backward and step, so their
    time is counted twice here; see seconds_per_step."""
    peak_memory_bytes: int = 0
    """Of this rank, over all processes that ran it, before and after a resume."""
    num_checkpoints: int = 0
    """Written so far."""
    checkpoint_seconds: float = 0.0
    """In which they held up this rank's training, but for that from which the run was taken up."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> {"last": ..., "best": ..., "at_best": ...}: this metric's value in the last epoch,
    its best value, and its value in the epoch in which the run's best_metric was best."""

    def note(self, metrics: dict[str, float], best_metric: str) -> bool:
        """Record an epoch's metrics; return whether `best_metric` is better than in all before."""
        before = self.metrics.get(best_metric, {}).get("best", math.nan)
        is_best = _is_better(best_metric, metrics[best_metric], before)
        for name, value in metrics.items():
            noted = self.metrics.setdefault(name, {"best": value, "at_best": value})
            noted["last"] = value
            if _is_better(name, value, noted["best"]):
                noted["best"] = value
            if is_best:
                noted["at_best"] = value
        return is_best

    def seconds_per_step(self) -> dict[str, float]:
        """Return the mean seconds of a step by phase; they add up to `total`.

        "backward" is what is left of backward and step without the phases of the exchange.
        """
        seconds = dict(self.phase_seconds)
        outer, total = seconds.pop("backward") + seconds.pop("step"), seconds.pop("total")
        inside = sum(v for phase, v in seconds.items() if phase not in ("data", "forward"))
        seconds["backward"] = outer - inside
        seconds["other"] = total - sum(seconds.values())
        return {phase: v / self.step for phase, v in {**seconds, "total": total}.items()}


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, which may be sparse: SGD's momentum of row-sparse gradients."""
    if not tensor.is_sparse:
        return tensor.nbytes
    return tensor._indices().nbytes + tensor._values().nbytes


@dataclass
class RunState:
    """One rank's model, optimizer, learning rate and progress."""

    model: nn.Module
    optimizer: ExchangingOptimizer
    learning_rate: LearningRate
    train_sums: Sums
    device: torch.device
    averaged: AveragedModel | None = None
    """The Polyak average of the parameters; if there is one, it is evaluated instead of them."""
    grad_scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))
    """The loss scale for float16; does nothing unless it is enabled."""
    progress: Progress = field(default_factory=Progress)
    carried: Carried = None
    """The state that this rank's last batch handed to the next one; see interfaces.Carried."""
    position: dict[str, Any] = field(default_factory=dict)
    """Where this rank's next batch begins; see interfaces.Batches."""

    def before_step(self) -> tuple[list[Tensor], Carried]:
        """Return what forward passes will change: copies of buffers and sums, the carried state."""
        return [tensor.clone() for tensor in self._changed_by_forward()], self.carried

    def undo_forward(self, before: tuple[list[Tensor], Carried]) -> None:
        """Restore what `before_step` returned. The optimizer has undone the rest of the step."""
        copies, self.carried = before
        for tensor, old in zip(self._changed_by_forward(), copies, strict=True):
            tensor.copy_(old)

    def _changed_by_forward(self) -> list[Tensor]:
        return [*self.model.buffers(), self.train_sums.values]

    def evaluated(self) -> nn.Module:
        """Return the model to evaluate. An averaged one gets the current buffers of the model."""
        if self.averaged is None:
            return self.model
        buffers = dict(self.model.named_buffers())
        for name, buffer in self.averaged.module.named_buffers():
            buffer.copy_(buffers[name])
        return self.averaged.module

    def shared(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks, as tensors and plain values."""
        averaged = {} if self.averaged is None else {"averaged": self.averaged.state_dict()}
        return {
            **averaged,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "progress": asdict(self.progress) | {"phase_seconds": {}, "peak_memory_bytes": 0},
        }

    def worker(self) -> dict[str, Any]:
        """Return the state that belongs to this rank, as tensors and plain values."""
        progress = self.progress
        own = {
            "exchange": self.optimizer.worker_state_dict(),
            "buffers": dict(self.model.named_buffers()),
            "train_sums": self.train_sums.values,
            "carried": self.carried,
            "position": self.position,
            "payload_bytes": progress.payload_bytes,
            "phase_seconds": dict(progress.phase_seconds),
            "peak_memory_bytes": self.peak_memory_bytes,
            "random": random_states(),
        }
        if self.device.type == "cuda":
            own["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return own

    def restore(
        self,
        shared: dict[str, Any],
        worker: dict[str, Any],
        parts: Iterable[tuple[int, dict[str, Any]]] | None = None,
    ) -> None:
        """Take over a saved state, bit for bit.

        Removes the model from `shared` after copying it, so that its memory is free for the rest.
        Args: parts: (rank, `worker` of that rank) that this rank has read, where ranks are placed
            otherwise than before; what they had not sent is then divided anew.
        """
        self.restore_shared(shared)
        self.learning_rate.load_state_dict(shared["learning_rate"])
        self.progress.payload_bytes = worker["payload_bytes"]
        self.progress.phase_seconds = dict(worker["phase_seconds"])
        self.progress.peak_memory_bytes = worker["peak_memory_bytes"]
        if parts is None:
            self.optimizer.load_worker_state_dict(worker["exchange"])
        else:
            self.optimizer.load_worker_states((rank, part["exchange"]) for rank, part in parts)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(worker["buffers"][name])
        self.train_sums.values.copy_(worker["train_sums"])
        self.carried = to_device(worker.get("carried"), self.device)
        self.position = worker.get("position", {})
        self.restore_random(worker)

    def restore_shared(self, shared: dict[str, Any]) -> None:
        """Take over what is equal on all ranks, but for the learning rate. Empties `shared` of the
        model."""
        self.restore_model(shared)
        for part in ("model", "averaged"):
            shared.pop(part, None)
        self.optimizer.load_state_dict(shared["optimizer"])
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(shared["grad_scaler"])
        self.progress = Progress(**shared["progress"])
        self.optimizer.set_epoch(self.progress.epoch)

    def restore_random(self, worker: dict[str, Any]) -> None:
        """Take over a rank's random states."""
        set_random_states(worker["random"])
        if self.device.type == "cuda" and "random_cuda" in worker:
            torch.cuda.set_rng_state(worker["random_cuda"], self.device)

    def restore_model(self, shared: dict[str, Any]) -> None:
        """Take over the parameters, buffers and average: what an evaluation needs."""
        if ("averaged" in shared) != (self.averaged is not None):
            has = "has an" if "averaged" in shared else "has no"
            raise CheckpointError(
                f"the checkpoint {has} average of the parameters; give configs.train.polyak_decay "
                "as it was when the run was started"
            )
        self.model.load_state_dict(shared["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(shared["averaged"])

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that this rank took, in this process or in those before a resume."""
        return max(self.progress.peak_memory_bytes, report.peak_memory_bytes(self.device))

    @property
    def dense_bytes_per_step(self) -> int:
        """Bytes of the whole gradient in float32, which is what a dense exchange usually sends."""
        numels = (p.numel() for p in self.model.parameters() if p.requires_grad)
        return torch.float32.itemsize * sum(numels)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of the tensors that live between steps, by kind."""
        state = self.optimizer.inner.state.values()
        tensors = [v for values in state for v in values.values() if torch.is_tensor(v)]
        parameters = list(self.model.parameters())
        averaged = () if self.averaged is None else self.averaged.module.parameters()
        return {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            **self.optimizer.worker_state_bytes(),
            "optimizer": sum(_num_bytes(t) for t in tensors),
            "buffers": sum(b.nbytes for b in self.model.buffers()),
            "averaged": sum(p.nbytes for p in averaged),
        }

    def result(self, world_size: int) -> dict[str, Any]:
        """Return the figures of the run for result.json."""
        progress = self.progress
        hashes = report.hash_tensors(self.model.named_parameters())
        return {
            "metrics": progress.metrics,
            "epochs": progress.epoch,
            "steps": progress.step,
            "skipped_steps": progress.skipped_steps,
            "world_size": world_size,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "payload_bytes_per_step": progress.payload_bytes / progress.step,
            "dense_bytes_per_step": self.dense_bytes_per_step,
            "seconds_per_step": progress.seconds_per_step(),
            "checkpoints": {
                "written": progress.num_checkpoints,
                "seconds_held_up": progress.checkpoint_seconds,
            },
            "state_bytes": self.state_bytes(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "parameter_hash": report.hash_all(hashes),
            "versions": report.versions(),
            "hardware": report.hardware(self.device),
        }
