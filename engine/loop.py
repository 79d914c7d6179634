"""The loop of a run: resume, train by epochs, evaluate, compare replicas, save, report.

Refuses to go on when replicas differ. All ranks run the same loop; only their reporter differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine import report
from engine.checkpoint import CheckpointFolder
from engine.interfaces import Comm, ExchangingOptimizer
from engine.meters import AccuracyMeter, PhaseTimer
from engine.sampling import EpochSampler
from engine.schedules import LearningRate

if TYPE_CHECKING:
    from configs.schema import Run

_DENSE_BYTES = 4  # dense practice sends float32


@dataclass
class Progress:
    """How far a run has come; plain values, saved with it."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    examples: int = 0
    """Over all ranks."""
    payload_bytes: int = 0
    """Sent by this rank so far."""
    seconds: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name -> {"last": ..., "best": ...}."""


class Trainer:
    """One rank's run. Everything it uses is handed to it, built."""

    def __init__(
        self,
        run: Run,
        *,
        comm: Comm,
        device: torch.device,
        model: nn.Module,
        loss: nn.Module,
        optimizer: ExchangingOptimizer,
        learning_rate: LearningRate,
        train_loader: DataLoader,
        sampler: EpochSampler,
        test_loader: DataLoader,
        folder: Path,
        flat_config: dict[str, Any],
        reporter: Any,
    ) -> None:
        self.run, self.comm, self.device = run, comm, device
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.learning_rate, self.sampler = learning_rate, sampler
        self.train_loader, self.test_loader = train_loader, test_loader
        self.flat_config, self.reporter = flat_config, reporter
        self.checkpoints = CheckpointFolder(folder / "checkpoints", comm, run.checkpoint.keep)
        self.progress = Progress()
        self.density = 1.0
        self.train_sums = AccuracyMeter(run.train.top_k, device)
        self.timed = PhaseTimer()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader) // self.run.train.micro_batches_per_step

    def train(self) -> None:
        """Take up the newest checkpoint, run what is left of the run, write result.json."""
        self._resume()
        self.reporter.start(self.progress.examples)
        self._clock, self._first_step = time.perf_counter(), self.progress.step
        self._first_seconds = self.progress.seconds
        while self.progress.epoch < self.run.train.num_epochs:
            self._train_epoch()
            self._end_epoch()
        if self.progress.step > self._first_step:
            self.reporter.result(self._result())
        else:
            self.reporter.say("this run is complete already; use --suffix for another")
        self.reporter.close()

    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracies over the test set, exactly, over all ranks."""
        meter = AccuracyMeter(self.run.train.top_k, self.device)
        self.model.eval()
        with torch.no_grad():
            for inputs, labels in self.test_loader:
                inputs, labels = inputs.to(self.device), labels.to(self.device)
                logits = self.model(inputs)
                meter.add(logits, labels, self.loss(logits, labels))
        self.model.train()
        return meter.reduce(self.comm, "test")

    def evaluate_best(self) -> dict[str, float]:
        """Load the best checkpoint's parameters and evaluate them."""
        self.model.load_state_dict(self.checkpoints.load_best()["model"])
        return self.evaluate()

    def _train_epoch(self) -> None:
        progress = self.progress
        self.density = self.optimizer.set_epoch(progress.epoch)
        if progress.step_in_epoch == 0:
            self.train_sums.sums.zero_()
        micro_batches = self.run.train.micro_batches_per_step
        first = progress.step_in_epoch * micro_batches * self.train_loader.batch_size
        self.sampler.start(progress.epoch, first)
        batches = iter(self.train_loader)
        for _ in self._progress_bar():
            start = time.perf_counter()
            last_loss = self._train_step(batches)
            self.timed.seconds["total"] += time.perf_counter() - start
            self._count_step()
            self._report_step(last_loss, time.perf_counter() - start)
            every = self.run.checkpoint.every_steps
            if (
                every
                and progress.step % every == 0
                and progress.step_in_epoch < self.steps_per_epoch
            ):
                self._save(is_best=False)

    def _progress_bar(self) -> Iterator[int]:
        """Iterate over the steps that are left of this epoch, with a bar on rank 0."""
        progress = self.progress
        return tqdm(
            range(progress.step_in_epoch, self.steps_per_epoch),
            desc=f"epoch {progress.epoch + 1}/{self.run.train.num_epochs}",
            initial=progress.step_in_epoch,
            total=self.steps_per_epoch,
            disable=self.comm.rank != 0,
            leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # each refresh is a line in a log
        )

    def _train_step(self, batches: Iterator[Any]) -> torch.Tensor:
        """One step of one or more micro-batches; return the last one's mean loss."""
        micro_batches = self.run.train.micro_batches_per_step
        for _ in range(micro_batches):
            with self.timed("data"):
                inputs, labels = next(batches)
                inputs = inputs.to(self.device, non_blocking=True)
                labels = labels.to(self.device, non_blocking=True)
            with self.timed("forward"):
                logits = self.model(inputs)
                loss = self.loss(logits, labels)
            with self.timed("backward"):
                (loss / micro_batches).backward()
            with torch.no_grad():
                self.train_sums.add(logits, labels, loss)
        with self.timed("step"):
            self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _count_step(self) -> None:
        train, progress, stats = self.run.train, self.progress, self.optimizer.stats
        per_rank = train.batch_size_per_rank * train.micro_batches_per_step
        progress.step += 1
        progress.step_in_epoch += 1
        progress.examples += per_rank * self.comm.world_size
        progress.payload_bytes += stats.payload_bytes
        for phase, seconds in stats.seconds.items():
            self.timed.seconds[phase] += seconds

    def _report_step(self, loss: torch.Tensor, seconds: float) -> None:
        if self.comm.rank != 0:
            return
        stats = self.optimizer.stats
        values = {
            "loss/train": loss.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "comm/density_asked": self.density,
            "comm/payload_bytes": stats.payload_bytes,
            "time/step_seconds": seconds,
        }
        if stats.num_selectable:
            values["comm/density_got"] = stats.num_selected / stats.num_selectable
        self.reporter.scalars(values, self.progress.examples)

    def _end_epoch(self) -> None:
        """Agree on buffers, evaluate, compare the replicas, save, tell."""
        progress = self.progress
        self._average_buffers()
        hashes = self._check_replicas()
        metrics = self.train_sums.reduce(self.comm, "train") | self.evaluate()
        is_best = self._note_metrics(metrics)
        progress.epoch += 1
        progress.step_in_epoch = 0
        last = progress.epoch == self.run.train.num_epochs
        if is_best or last or progress.epoch % self.run.checkpoint.every_epochs == 0:
            self._save(is_best=is_best)
        del metrics["loss/train"]  # its events are those of the steps
        self.reporter.scalars(metrics, progress.examples)
        self._say_epoch(report.hash_all(hashes))

    def _say_epoch(self, parameter_hash: str) -> None:
        progress, stats = self.progress, self.optimizer.stats
        last = {name: value["last"] for name, value in progress.metrics.items()}
        payload, dense = stats.payload_bytes, self._dense_bytes_per_step()
        steps = progress.step - self._first_step
        self.reporter.say(
            f"epoch {progress.epoch:3d}/{self.run.train.num_epochs}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in last.items())
            + f"; density {self.density:.3g}, sent {report.bytes_text(payload)} a step "
            f"(1/{dense / max(1, payload):.0f} of dense), "
            f"{self.timed.seconds['total'] / steps:.3f} s a step, "
            f"parameters {parameter_hash[:8]}"
        )

    def _note_metrics(self, metrics: dict[str, float]) -> bool:
        """Record an epoch's metrics; tell whether it is the best so far."""
        noted = self.progress.metrics
        for name, value in metrics.items():
            better = min if name.startswith("loss") else max
            best = better(value, noted[name]["best"]) if name in noted else value
            noted.setdefault(name, {}).update(last=value, best=best)
        first = self.run.train.best_metric
        is_best = noted[first]["best"] > noted[first].get("kept", float("-inf"))
        if is_best:
            noted[first]["kept"] = noted[first]["best"]
        return is_best

    def _average_buffers(self) -> None:
        """Give every rank the mean of the ranks' batch statistics."""
        floating = [b for b in self.model.buffers() if b.is_floating_point() and b.numel()]
        if floating and self.comm.world_size > 1:
            flat = torch.cat([b.float().reshape(-1) for b in floating])
            flat = self.comm.all_reduce_async(flat, "buffers").wait() / self.comm.world_size
            for buffer, mean in zip(
                floating, flat.split([b.numel() for b in floating]), strict=True
            ):
                buffer.copy_(mean.view_as(buffer))

    def _check_replicas(self) -> dict[str, str]:
        """Return a hash of each parameter. Raises RuntimeError if ranks disagree on one."""
        mine = report.hash_tensors(self.model.named_parameters())
        for rank, theirs in enumerate(self.comm.all_gather_object(mine)):
            bad = [name for name in mine if mine[name] != theirs[name]]
            if bad:
                raise RuntimeError(
                    f"replicas differ after epoch {self.progress.epoch + 1}: ranks "
                    f"{self.comm.rank} and {rank} disagree on {len(bad)} parameters, the first is "
                    f"{bad[0]}; restart from the last checkpoint and report this"
                )
        return mine

    def _save(self, *, is_best: bool) -> None:
        self.progress.seconds = self._first_seconds + time.perf_counter() - self._clock
        shared = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "progress": asdict(self.progress),
            "config": self.flat_config,
        }
        worker = {
            "exchange": self.optimizer.worker_state_dict(),
            "buffers": dict(self.model.named_buffers()),
            "train_sums": self.train_sums.sums,
            "payload_bytes": self.progress.payload_bytes,
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            worker["random_cuda"] = torch.cuda.get_rng_state(self.device)
        self.checkpoints.save(self.progress.step, shared, worker, is_best=is_best)

    def _resume(self) -> None:
        """Take up the newest checkpoint, if there is one; else agree on rank 0's model."""
        loaded = self.checkpoints.load_latest()
        if loaded is None:
            torch.manual_seed(self.run.seed + self.comm.rank)  # ranks drop out different units
            for name, tensor in self.model.state_dict().items():
                self.comm.broadcast(tensor, f"initial.{name}")
            return
        shared, worker = loaded
        self._refuse_other_config(shared["config"])
        self.reporter.say(f"resuming after step {shared['progress']['step']}")
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.learning_rate.load_state_dict(shared["learning_rate"])
        self.progress = Progress(**shared["progress"])
        self.progress.payload_bytes = worker["payload_bytes"]
        self.optimizer.set_epoch(self.progress.epoch)
        self.optimizer.load_worker_state_dict(worker["exchange"])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(worker["buffers"][name])
        self.train_sums.sums.copy_(worker["train_sums"])
        torch.set_rng_state(worker["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(worker["random_cuda"], self.device)

    def _refuse_other_config(self, saved: dict[str, Any]) -> None:
        keys = sorted(saved.keys() | self.flat_config.keys())
        changed = [
            f"{key}: {saved.get(key)!r} then, {self.flat_config.get(key)!r} now"
            for key in keys
            if saved.get(key) != self.flat_config.get(key)
        ]
        if changed:
            raise SystemExit(
                "this run's folder holds a checkpoint made with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse --suffix to start another run, or delete the folder"
            )

    def _dense_bytes_per_step(self) -> int:
        return _DENSE_BYTES * sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def _result(self) -> dict[str, Any]:
        progress = self.progress
        hashes = report.hash_tensors(self.model.named_parameters())
        return {
            "metrics": {
                name: {"last": value["last"], "best": value["best"]}
                for name, value in progress.metrics.items()
            },
            "epochs": progress.epoch,
            "steps": progress.step,
            "world_size": self.comm.world_size,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "payload_bytes_per_step": progress.payload_bytes / progress.step,
            "dense_bytes_per_step": self._dense_bytes_per_step(),
            "seconds_per_step": self._seconds_per_step(),
            "total_seconds": self._first_seconds + time.perf_counter() - self._clock,
            "state_bytes": self._state_bytes(),
            "peak_memory_bytes": report.peak_memory_bytes(self.device),
            "parameter_hash": report.hash_all(hashes),
            "config": self.flat_config,
            "versions": report.versions(),
            "hardware": report.hardware(self.device),
        }

    def _seconds_per_step(self) -> dict[str, float]:
        """Return seconds by phase since the start or resume; they add up to `total`.

        What the exchange did inside backward and step is told apart from them.
        """
        seconds = dict(self.timed.seconds)
        outer = seconds.pop("backward") + seconds.pop("step")
        total, inner = seconds.pop("total"), ("data", "forward")
        seconds["backward"] = outer - sum(v for k, v in seconds.items() if k not in inner)
        seconds["other"] = total - sum(seconds.values())
        steps = self.progress.step - self._first_step
        return {phase: value / steps for phase, value in {**seconds, "total": total}.items()}

    def _state_bytes(self) -> dict[str, int]:
        """Return the bytes that live between steps, counted from the tensors themselves."""
        state = self.optimizer.inner.state.values()
        tensors = [v for values in state for v in values.values() if torch.is_tensor(v)]
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "residual": 0,
            "velocity": 0,
            **self.optimizer.worker_state_bytes(),
            "optimizer": sum(t.nbytes for t in tensors),
            "buffers": sum(b.nbytes for b in self.model.buffers()),
        }
