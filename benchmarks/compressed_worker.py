"""One worker of compressed_training.py: trains a replica, measures what it keeps and sends."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from benchmarks.compressed_methods import ALL
from benchmarks.simulated import Backward, Task
from benchmarks.words import rate_factor
from dgc import DistributedOptimizer
from dgc.comm.local import LocalComm
from engine.replicas import average_batch_statistics

NUM_EPOCHS = 25  # the steps are divided into so many; the density warm-up takes the first five
NUM_CHECKS = 8  # evaluations during a run


class Worker:
    """One worker's replica in a run, and what the run comes to."""

    def __init__(
        self, comm: LocalComm, settings: dict[str, Any], task: Task, model: nn.Module
    ) -> None:
        self.comm, self.settings, self.task, self.model = comm, settings, task, model
        self.method = ALL[settings["method"]]
        self.optimizer = DistributedOptimizer(
            self.method.optimizer(model, settings["lr"]),
            model.named_parameters(),
            comm=comm,
            compression=self.method.compression(settings["density"], task.clip_norm),
            seed=settings["seed"],
        )
        self.curve: list[tuple[int, float]] = []
        self.seconds, self.num_skipped = 0.0, 0
        self.state_bytes: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Train, with evaluations in between; stop at a loss that is not finite."""
        num_steps, epoch = self.task.num_steps, -1
        batches = self.task.batches(self.comm.rank, self.comm.world_size, self.settings["seed"])
        for step, backward in zip(range(num_steps), batches, strict=False):
            if step * NUM_EPOCHS // num_steps != epoch:
                epoch = step * NUM_EPOCHS // num_steps
                self.optimizer.set_epoch(epoch)
            loss = self.step(backward, self.settings["lr"] * rate_factor(step, num_steps))
            if not math.isfinite(self.comm.all_gather_object(loss)[0]):
                break
            if (step + 1) * NUM_CHECKS // num_steps != step * NUM_CHECKS // num_steps:
                self.check(step + 1)
        return self.result()

    def step(self, backward: Backward, lr: float) -> float:
        """Make a step; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        loss = backward(self.model)
        if self.method.sent is None and self.task.clip_norm:
            self.optimizer.synchronize()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip_norm)
        self.optimizer.step()
        self.state_bytes = state_bytes(self.optimizer, self.model)
        self.optimizer.zero_grad()
        self.seconds += time.perf_counter() - start
        self.num_skipped += bool(self.optimizer.stats.skipped)
        return loss

    def check(self, num_steps: int) -> None:
        """Add a point to the curve, on rank 0."""
        average_batch_statistics(self.model, self.comm)
        if self.comm.rank == 0:
            self.curve.append((num_steps, self.task.evaluate(self.model, is_final=False)))

    def result(self) -> dict[str, Any]:
        vector = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        assert all(torch.equal(vector, other) for other in self.comm.all_gather_object(vector))
        is_first = self.comm.rank == 0
        return {
            "quality": self.task.evaluate(self.model, is_final=True) if is_first else math.nan,
            "quality_name": self.task.quality,
            "validation": self.curve[-1][1] if self.curve else math.nan,
            "curve": self.curve,
            "payload_bytes": self.optimizer.stats.payload_bytes,
            "skipped_steps": self.num_skipped,
            "seconds": self.seconds,
            "steps": self.task.num_steps,
            "state_bytes": self.state_bytes,
            "num_parameters": vector.numel(),
        }


def state_bytes(optimizer: DistributedOptimizer, model: nn.Module) -> dict[str, int]:
    """Return the bytes of the tensors beside the parameters when a step is over, by kind."""
    state = [t for s in optimizer.inner.state.values() for t in s.values() if torch.is_tensor(t)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "gradients": sum(g.nbytes for g in gradients),
        **optimizer.worker_state_bytes(),
        "optimizer": sum(t.nbytes for t in state),
    }
