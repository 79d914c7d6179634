"""When a run's checkpoints are finished, what a failure of one means, and what they cost.

With checkpoint.asynchronous a checkpoint is written beside training, and finished after the step in
which every rank tells that its parts are written, or by whatever needs it finished before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.checkpoint import CheckpointFolder
from engine.interfaces import CheckpointSettings
from engine.report import Reporter, SilentReporter
from engine.state import RunState
from engine.writing import WriteError


class Saver:
    """Saves the state of a run. All methods but `notices` are collectives."""

    def __init__(
        self, checkpoints: CheckpointFolder, settings: CheckpointSettings, state: RunState,
        reporter: Reporter | SilentReporter, world_size: int,
    ) -> None:  # fmt: skip
        self._checkpoints, self._settings, self._state = checkpoints, settings, state
        self._reporter, self._world_size = reporter, world_size
        self._asked_about: int | None = None  # the step of the checkpoint that notices tell of
        self._seconds = 0.0  # in which the checkpoint under way has held up training
        self.saved_step: int | None = None
        """The step of the newest checkpoint, where this process has read or finished it."""

    def save(self, facts: dict[str, Any], *, is_best: bool, is_last: bool = False) -> None:
        """Write a checkpoint of the state and of facts about the run, or begin to.

        Args: is_last: the job ends with it, so that it must be finished here.
        """
        self.finish()
        if self._state.progress.step == self.saved_step:  # an epoch ends, of which no step was left
            try:
                if is_best:
                    self._checkpoints.mark_best(self.saved_step)
            except WriteError as error:
                self._tolerate(error, self.saved_step, is_last)
            return
        beside = self._settings.asynchronous
        with self._counted():
            self._reporter.flush()
            self._state.progress.num_checkpoints += 1
            self._checkpoints.begin(
                self._state.progress.step, {**self._state.shared(), **facts},
                self._state.worker(), is_best=is_best, beside=beside,
            )  # fmt: skip
        if is_last or not beside:
            self.finish(is_last=is_last)

    def finish(self, *, is_last: bool = False) -> None:
        """Finish the checkpoint that was begun, if one was.

        Raises: WriteError if it cannot be written, where a run stops for that, or ends with it.
        """
        step = self._checkpoints.pending_step
        if step is None:
            return
        try:
            with self._counted():
                self._checkpoints.finish()
            self.saved_step = step
        except WriteError as error:
            self._state.progress.num_checkpoints -= 1
            self._tolerate(error, step, is_last)
        self._report_seconds()

    def notices(self) -> dict[str, int]:
        """Return what this rank tells the others when a step begins."""
        self._asked_about = self._checkpoints.pending_step
        return {"written": int(self._checkpoints.is_written)}

    def heed(self, notices: dict[str, int]) -> None:
        """Finish the checkpoint if all ranks have told that they have written it."""
        is_same = self._asked_about == self._checkpoints.pending_step
        if is_same and notices["written"] == self._world_size:
            self.finish()

    def _tolerate(self, error: WriteError, step: int, is_last: bool) -> None:
        """Raise it, unless the run is to go on after one and does not end anyway."""
        if is_last or self._settings.on_error == "stop":
            raise error
        self._reporter.say(f"training goes on without a checkpoint of step {step}: {error}")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the time in which training is held up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    def _report_seconds(self) -> None:
        progress = self._state.progress
        progress.checkpoint_seconds += self._seconds
        self._reporter.scalars({"time/checkpoint_seconds": self._seconds}, progress.examples)
        self._seconds = 0.0
