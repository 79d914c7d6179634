"""Predict the memory of a training step, by running the code that trains on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memory import tracker as kinds
from memory.answers import UNANSWERED, Answers, Recorder
from memory.fakes import without_data
from memory.job import Contender, Job
from memory.rehearsal import Rehearsal
from memory.tracker import Tracker

_NOT_KEPT = (kinds.ACTIVATIONS, kinds.INPUTS, kinds.TEMPORARIES)
NUM_STEPS = 2  # the first makes state; in the second, renewed buffers are there in old and new form


@dataclass(frozen=True)
class Prediction:
    """The predicted bytes of one rank.

    kept: kind -> bytes alive when a step is over, gradients included.
    peak: kind -> bytes at the moment of a step when most bytes are alive.
    phase: in which this moment is: forward, backward or step. peaks: phase -> its own peak.
    by_tensor: parameter -> kind -> bytes kept.
    recorded: whether shapes that depend on data were taken from a real batch.
    note: a remark for the tables.
    """

    contender: str
    batch_size: int
    num_parameters: int
    kept: dict[str, int]
    peak: dict[str, int]
    phase: str
    peaks: dict[str, int] = field(default_factory=dict)
    by_tensor: dict[str, dict[str, int]] = field(default_factory=dict)
    recorded: bool = False
    note: str = ""

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class Predictor:
    """Predicts the memory of one job with any contender. Looks at real batches only once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._shapes = BatchShapes(job.make_batch, job.batch_size)
        self._recorded: list[Any] | None = None

    def __call__(self, contender: Contender, batch_size: int | None = None) -> Prediction:
        """Predict for a contender, with the job's batch size or another one.

        Raises: ValueError if the model does something that fake tensors cannot do.
        """
        batch_size = batch_size or self.job.batch_size
        try:
            return self._predict(contender, batch_size)
        except UNANSWERED as error:
            if self._recorded is not None:
                raise ValueError(f"the model asks for values with {error.args[0]}, of which a real "
                                 f"batch told nothing") from error  # fmt: skip
        self._recorded = record(self.job)
        return self._predict(contender, batch_size)

    def _predict(self, contender: Contender, batch_size: int) -> Prediction:
        answers, shapes = Answers(self._recorded), self._shapes.at(batch_size)
        with (
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
            Tracker(self.job.device.type) as tracker,
            answers,
            without_data(),
        ):
            run = Rehearsal(self.job, contender, tracker, answers=answers, fake=fake)
            makers = [lambda: _empty(shapes, self.job.device)] * self.job.micro_batches
            for _ in range(NUM_STEPS):
                tracker.forget_peak()
                kept = run.step(makers)
            return summarize(run, kept, batch_size, self._recorded is not None)


def summarize(
    run: Rehearsal, kept: kinds.Moment, batch_size: int, recorded: bool = False
) -> Prediction:
    """Return the prediction that follows from the last step of a rehearsal."""
    peak = run.tracker.at_peak()
    contender = run.contender
    return Prediction(
        contender=contender.name,
        batch_size=batch_size,
        num_parameters=sum(p.numel() for p in run.model.parameters()),
        kept={kind: size for kind, size in kept.by_kind.items() if kind not in _NOT_KEPT},
        peak=peak.by_kind,
        phase=peak.phase,
        peaks=dict(run.tracker.peak_by_phase),
        by_tensor=run.kept_by_tensor,
        recorded=recorded,
        note=run.note,
    )


def record(job: Job) -> list[Any]:
    """Run one forward and backward on a real batch; return the values that it asked for."""
    batch = [tensor.to(job.device) for tensor in job.make_batch(job.batch_size)]
    with torch.device(job.device) if job.device.type != "cpu" else contextlib.nullcontext():
        model = job.make_model()
    model.train()
    with Recorder() as recorder, job.autocast():
        loss, _, _ = job.task(model, batch, None)
        loss.backward()
    return recorder.answers


class BatchShapes:
    """The shapes of the tensors of a batch of any size.

    Each axis is taken to be linear in the number of samples. The line is found from two real
    batches, of the given size and of half of it.
    """

    def __init__(self, make_batch: Callable[[int], Sequence[Tensor]], batch_size: int) -> None:
        self._make, self._size = make_batch, batch_size
        self._batch = _shapes_of(make_batch(batch_size))
        self._other: tuple[int, list[Any]] | None = None

    def at(self, batch_size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of a batch of so many samples."""
        if batch_size == self._size:
            return self._batch
        if self._other is None:
            size = self._size // 2 or 2
            self._other = size, _shapes_of(self._make(size))
        size, other = self._other
        return [
            (tuple(_on_line(self._size, a, size, b, batch_size)
                   for a, b in zip(mine, theirs, strict=True)), dtype)
            for (mine, dtype), (theirs, _) in zip(self._batch, other, strict=True)
        ]  # fmt: skip


def _shapes_of(batch: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in batch]


def _on_line(x0: int, y0: int, x1: int, y1: int, x: int) -> int:
    return round(y0 + (y1 - y0) / (x1 - x0) * (x - x0))


def _empty(shapes: Sequence[Any], device: torch.device) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
