"""The loop of a run: resume, train epoch by epoch, evaluate, compare replicas, save, report.

Stops the run when replicas differ. All ranks run the same loop; only rank 0's reporter speaks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import report
from engine.checkpoint import CheckpointError, CheckpointFolder, Loaded, readable
from engine.handover import take_over
from engine.interfaces import Batch, Batches, Carried, Collectives, RunSettings, Task
from engine.meters import Stopwatch, Sums, add_seconds
from engine.notices import Notices
from engine.precision import autocast
from engine.replicas import agreed_hash, average_batch_statistics, refuse_writes
from engine.sampling import seed_all
from engine.saving import Saver
from engine.state import RunState
from engine.step_reports import StepReports
from engine.stopping import StopSignals, exit_status

_NUM_EPOCHS = "configs.train.num_epochs"


class Trainer:
    """One rank's run, made of parts that assembly.parts builds.

    Args:
        batches: split -> batches; the splits other than "train" are evaluated.
        flat_config, data_facts: the settings and facts of the data that a checkpoint stores.
        config_changes: takes stored and present settings (or facts) and returns a line for each
            one whose change would change the run's numbers.
    """

    def __init__(
        self,
        run: RunSettings,
        state: RunState,
        *,
        comm: Collectives,
        task: Task,
        batches: dict[str, Batches],
        folder: Path,
        steps_per_epoch: int,
        flat_config: dict[str, Any],
        data_facts: dict[str, Any],
        config_changes: Callable[[dict[str, Any], dict[str, Any]], list[str]],
        reporter: report.Reporter | report.SilentReporter,
    ) -> None:
        self.run, self.state, self.comm, self.task = run, state, comm, task
        self.batches, self.flat_config, self.reporter = batches, flat_config, reporter
        self._data_facts = data_facts
        self._step_reports = StepReports(reporter, run.report.every_steps)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", comm, run.checkpoint.keep)
        self._saver = Saver(self.checkpoints, run.checkpoint, state, reporter, comm.world_size)
        self.steps_per_epoch, self._config_changes = steps_per_epoch, config_changes
        self.notices = Notices(comm, ("stop", "interrupt", "written"))
        self.density, self._last_explanation = 1.0, ""
        self._last_step_in_epoch = steps_per_epoch
        self._signals: StopSignals | None = None
        self._exit_status: int | None = None  # of a job that a signal stops
        self._watched: set[bool] = set()  # model.training of the passes watched in this epoch

    def train(self, signals: StopSignals | None = None) -> int:
        """Take up the newest checkpoint, train what is left of the run, write result.json.

        Args: signals: that ask all ranks to save and stop.
        Returns: the exit status of the job.
        """
        self._signals = signals
        self._resume()
        readable(self.state.shared(), "shared")  # refuse now rather than after an epoch
        readable(self.state.worker(), "worker")
        self.reporter.start(self.state.progress.examples, self.flat_config)
        self._ask()
        first_epoch = self.state.progress.epoch
        if first_epoch == self.run.train.num_epochs:
            self.reporter.say("this run is complete; use --suffix for another")
        elif self._exit_status is None:  # launch/output.py looks for this
            self.reporter.say(f"training begins with step {self.state.progress.step + 1}")
        try:
            self._train_epochs()
        except BaseException:  # the last steps before an error tell of it
            with suppress(Exception):
                self._step_reports.write()
                self.reporter.flush()
            raise
        self._step_reports.write()
        self._saver.finish()
        if self._exit_status is not None:
            self._stop()
        elif first_epoch < self.run.train.num_epochs or not self.reporter.has_result:
            result = self.state.result(self.comm.world_size)
            self.reporter.result({**result, "config": self.flat_config})
        self.reporter.close()
        return self._exit_status or 0

    def _train_epochs(self) -> None:
        while self._exit_status is None and self.state.progress.epoch < self.run.train.num_epochs:
            self._train_epoch()
            if self._exit_status is None:
                self._end_epoch()

    def _stop(self) -> None:
        """Save, unless this step is saved, and tell how to go on."""
        step = self.state.progress.step
        if step not in (0, self._saver.saved_step):
            self._save(is_best=False, is_last=True)
        where = f"after step {step}, which is saved" if step else "before the first step"
        self.reporter.say(f"stopped by a signal {where}: the same command goes on from there")

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics, over all ranks, of every split except "train"."""
        model, metrics = self.state.evaluated(), {}
        model.eval()
        for split, batches in self.batches.items():
            if split != "train":
                sums = self._evaluate_split(model, batches).reduce(self.comm, split)
                metrics |= self._metrics(sums, split)
        model.train()
        return metrics

    @torch.no_grad()
    def _evaluate_split(self, model: nn.Module, batches: Batches) -> Sums:
        total, carried = Sums(self.task.num_sums, self.state.device), None
        for batch in batches.start(0, 0, {}):
            _, sums, carried = self._forward(model, self._to_device(batch), carried)
            total.add(sums)
        return total

    def _metrics(self, sums: list[float], split: str) -> dict[str, float]:
        """Return the task's metrics as plain numbers, also where it returns tensors."""
        return {name: float(value) for name, value in self.task.metrics(sums, split).items()}

    def evaluate_best(self) -> dict[str, float]:
        """Load the best checkpoint's parameters and evaluate them."""
        self.state.restore_model(self.checkpoints.load_best(without=["optimizer"]))
        return self.evaluate()

    def _resume(self) -> None:
        """Take up the newest checkpoint; without one, give all ranks the model of rank 0."""
        loaded = self.checkpoints.load_latest()
        if loaded is None:
            torch.manual_seed(self.run.seed + self.comm.rank)  # so that dropout differs by rank
            seed_all(self.run.seed + self.comm.rank)
            for name, tensor in self.state.model.state_dict().items():
                if torch.is_tensor(tensor):  # the extra state of a module may be anything
                    self.comm.broadcast(tensor, f"initial.{name}")
            return
        shared, then = loaded.shared, loaded.shared["config"]
        num_epochs = then.get(_NUM_EPOCHS, self.run.train.num_epochs)
        if not self.state.learning_rate.depends_on_length(num_epochs):
            then = {**then, _NUM_EPOCHS: self.run.train.num_epochs}  # the past would be the same
        self._refuse_others("settings", then, self.flat_config)
        self._refuse_others("data", shared.get("data", self._data_facts), self._data_facts)
        self._restore(loaded)

    def _restore(self, loaded: Loaded) -> None:
        """Take over a checkpoint, of as many ranks or of others, and tell what that changes."""
        state, rate = self.state, _rate_of(loaded.shared["optimizer"])
        if loaded.mine is None:
            take_over(
                state, loaded.shared, loaded.parts(), comm=self.comm,
                batches=self.batches["train"], steps_per_epoch=self.steps_per_epoch,
                micro_batches=self.run.train.micro_batches_per_step, seed=self.run.seed,
            )  # fmt: skip
        else:
            is_own = state.optimizer.is_own_worker_state(loaded.mine["exchange"])
            is_placed_alike = all(self.comm.all_gather_object(is_own))
            state.restore(loaded.shared, loaded.mine, None if is_placed_alike else loaded.parts())
        self._saver.saved_step = state.progress.step
        self.reporter.say(f"resuming after step {state.progress.step}")
        if loaded.mine is None:
            self._tell_of_others(loaded.world_size, rate)
        elif not is_placed_alike:
            self.reporter.say(
                "ranks are placed otherwise than before: what they had not sent is divided among "
                "them anew"
            )

    def _tell_of_others(self, world_size: int, rate: float) -> None:
        """Tell what changes with another number of ranks than the `world_size` before."""
        now, train = self.comm.world_size, self.run.train
        size = self.batches["train"].samples_per_batch * train.micro_batches_per_step
        self.reporter.say(
            f"now with {now} ranks instead of {world_size}: what those had not sent is divided "
            f"among these\n"
            f"  samples of a step: {size * world_size} -> {size * now}\n"
            f"  learning rate: {rate:.6g} -> {_rate_of(self.state.optimizer):.6g}\n"
            f"  steps left of this epoch: {self._steps_left()} of now {self.steps_per_epoch} an "
            f"epoch"
        )

    def _refuse_others(self, what: str, then: dict[str, Any], now: dict[str, Any]) -> None:
        if changed := self._config_changes(then, now):
            raise CheckpointError(
                f"this run's folder holds a checkpoint made with other {what} (then, now):\n  "
                + "\n  ".join(changed)
                + "\nUse --suffix to start another run, or delete the folder"
            )

    def _train_epoch(self) -> None:
        state, progress = self.state, self.state.progress
        self._set_density()
        self._watched.clear()
        if progress.step_in_epoch == 0:
            state.train_sums.values.zero_()
            state.carried, state.position = None, {}
        first = progress.step_in_epoch * self.run.train.micro_batches_per_step
        self._last_step_in_epoch = progress.step_in_epoch + self._steps_left()
        batches = self.batches["train"].start(progress.epoch, first, state.position)
        for _ in self._progress_bar():
            self.notices.start(**self._my_notices())
            start = time.perf_counter()
            loss = self.train_step(batches)
            seconds = time.perf_counter() - start
            self._count_step(seconds)
            self._report_step(loss, seconds)
            state.learning_rate.step()
            if self._saves_here():
                self._save(is_best=False)
            self._heed(self.notices.finish())
            if self._exit_status is not None:
                break

    def _steps_left(self) -> int:
        """Return how many steps this epoch has left."""
        micro_batches = self.run.train.micro_batches_per_step
        first = self.state.progress.step_in_epoch * micro_batches
        return self.batches["train"].num_left(first, self.state.position) // micro_batches

    def _ask(self) -> None:
        """Heed what ranks have noticed since the last step. A collective."""
        self.notices.start(**self._my_notices())
        self._heed(self.notices.finish())

    def _my_notices(self) -> dict[str, int]:
        """Return what this rank wants all to know at the end of the step that begins."""
        signals = {} if self._signals is None else self._signals.notices()
        return signals | self._saver.notices()

    def _heed(self, notices: dict[str, int]) -> None:
        """Do what the ranks' notices, summed, ask for at the end of a step."""
        self._saver.heed(notices)
        self._exit_status = exit_status(notices)

    def _set_density(self) -> None:
        """Set the epoch's density; when that changes the exchange, print how buckets are sent."""
        self.density = self.state.optimizer.set_epoch(self.state.progress.epoch)
        explanation = self.state.optimizer.explain()
        if explanation != self._last_explanation:
            self.reporter.say(
                f"density {self.density:.3g}, the exchange as planned:\n{explanation}"
            )
        self._last_explanation = explanation

    def _progress_bar(self) -> Iterator[int]:
        """Iterate over the steps left in this epoch, with a progress bar on rank 0."""
        progress = self.state.progress
        return tqdm(
            range(progress.step_in_epoch, self._last_step_in_epoch),
            desc=f"epoch {progress.epoch + 1}/{self.run.train.num_epochs}",
            initial=progress.step_in_epoch,
            total=self._last_step_in_epoch,
            disable=self.comm.rank != 0,
            leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # in a log each refresh is a line
        )

    def _forward(
        self, model: nn.Module, batch: Batch, carried: Carried
    ) -> tuple[Tensor, Tensor, Carried]:
        with self._watch(model), autocast(self.run.train.precision, self.state.device):
            return self.task(model, batch, carried)

    def _watch(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context that refuses writes to parameters.

        Only the first forward pass of each epoch in training, and in evaluation, is watched: to
        watch all of them would take time.
        """
        if self.comm.world_size == 1 or model.training in self._watched:
            return nullcontext()
        self._watched.add(model.training)
        return refuse_writes(model)

    def _to_device(self, batch: Batch) -> list[Tensor]:
        return [tensor.to(self.state.device, non_blocking=True) for tensor in batch]

    def train_step(self, batches: Iterator[Any]) -> Tensor:
        """Make one step of one or more micro-batches; return the mean loss of the last one."""
        state, micro_batches = self.state, self.run.train.micro_batches_per_step
        before = state.before_step()
        phases = Stopwatch(state.progress.phase_seconds)
        for _ in range(micro_batches):
            batch = self._to_device(next(batches))
            phases.end("data")
            loss, sums, state.carried = self._forward(state.model, batch, state.carried)
            phases.end("forward")
            state.grad_scaler.scale(loss / micro_batches).backward()
            state.train_sums.add(sums)
            phases.end("backward")
        if self.run.dgc is None and self.run.train.clip_norm is not None:
            state.optimizer.clip_grad_norm_(self.run.train.clip_norm)
        state.grad_scaler.step(state.optimizer)
        state.grad_scaler.update()
        if state.optimizer.stats.skipped:
            state.undo_forward(before)
        elif state.averaged is not None:
            state.averaged.update_parameters(state.model)
        phases.end("step")
        state.optimizer.zero_grad()
        return loss.detach()

    def _count_step(self, seconds: float) -> None:
        train, progress, stats = self.run.train, self.state.progress, self.state.optimizer.stats
        samples = self.batches["train"].samples_per_batch * train.micro_batches_per_step
        samples *= self.comm.world_size
        progress.step += 1
        progress.step_in_epoch += 1
        progress.examples += samples
        progress.payload_bytes += stats.payload_bytes
        progress.skipped_steps += stats.skipped is not None
        for phase, part in {**stats.seconds, "total": seconds}.items():
            add_seconds(progress.phase_seconds, phase, part)

    def _report_step(self, loss: Tensor, seconds: float) -> None:
        if self.comm.rank != 0:
            return
        stats, progress = self.state.optimizer.stats, self.state.progress
        values = {
            "lr": float(self.state.optimizer.param_groups[0]["lr"]),
            "comm/density_asked": self.density,
            "comm/payload_bytes": stats.payload_bytes,
            "time/step_seconds": seconds,
        }
        on_device = {f"threshold/{name}": least for name, least in stats.least_taken.items()}
        if stats.skipped:
            values["train/skipped_steps"] = progress.skipped_steps
        else:
            on_device["loss/train"] = loss
        values |= {f"comm/{kind}_bytes": count for kind, count in stats.bytes_by_kind.items()}
        values |= {f"time/{phase}_seconds": part for phase, part in stats.seconds.items()}
        values["comm/hidden_share"] = stats.hidden_share
        if stats.num_selectable:
            values["comm/density_got"] = stats.num_selected / stats.num_selectable
        self._step_reports.add(values, on_device, progress.examples)

    def _saves_here(self) -> bool:
        every, progress = self.run.checkpoint.every_steps, self.state.progress
        # The epoch's end saves by itself.
        is_within = progress.step_in_epoch < self._last_step_in_epoch
        return every is not None and is_within and progress.step % every == 0

    def _end_epoch(self) -> None:
        """Average batch statistics, compare the replicas, evaluate, save, report."""
        self._saver.finish()  # an evaluation may take long
        state, progress = self.state, self.state.progress
        average_batch_statistics(state.model, self.comm)
        parameter_hash = agreed_hash(state.model, self.comm, f"epoch {progress.epoch + 1}")
        sums = state.train_sums.reduce(self.comm, "train")
        metrics = self._metrics(sums, "train") | self.evaluate()
        is_best = progress.note(metrics, self.run.train.best_metric)
        state.learning_rate.end_epoch(metrics[self.run.train.best_metric])
        progress.epoch += 1
        progress.step_in_epoch = 0
        last = progress.epoch == self.run.train.num_epochs
        if is_best or last or progress.epoch % self.run.checkpoint.every_epochs == 0:
            self._save(is_best=is_best)
        self._report_epoch(metrics, parameter_hash)
        if not last:  # evaluation may have taken long: a signal need not wait for another step
            self._ask()

    def _report_epoch(self, metrics: dict[str, float], parameter_hash: str) -> None:
        state, progress = self.state, self.state.progress
        self._step_reports.write()
        # every step has written an event of loss/train already
        events = {name: value for name, value in metrics.items() if name != "loss/train"}
        self.reporter.scalars(events, progress.examples)
        payload = state.optimizer.stats.payload_bytes
        self.reporter.say(
            f"epoch {progress.epoch:3d}/{self.run.train.num_epochs}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            + f"; density {self.density:.3g}, sent {report.bytes_text(payload)} a step "
            f"(1/{state.dense_bytes_per_step / max(1, payload):.0f} of dense), "
            f"{progress.phase_seconds['total'] / progress.step:.3f} s a step, "
            f"parameters {parameter_hash[:8]}"
            + (f"; steps undone so far: {progress.skipped_steps}" if progress.skipped_steps else "")
        )

    def _save(self, *, is_best: bool, is_last: bool = False) -> None:
        self._step_reports.write()  # no event is older than the checkpoint
        self.state.position = self.batches["train"].position()
        facts = {"config": self.flat_config, "data": self._data_facts}
        self._saver.save(facts, is_best=is_best, is_last=is_last)


def _rate_of(optimizer: Any) -> float:
    """Return the first group's learning rate, of an optimizer or of its saved state."""
    is_state = isinstance(optimizer, dict)
    groups = optimizer["param_groups"] if is_state else optimizer.param_groups
    return float(groups[0]["lr"])
