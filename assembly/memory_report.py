"""train.py --report memory: predict the memory of a run, and measure a few real steps beside it.

Turns the description of a run into a Job of the memory room, which predicts and compares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memory
from assembly import data, parts
from configs.schema import Run
from dgc.comm import Comm
from engine.interfaces import Batch
from engine.loop import Trainer
from engine.report import Reporter, SilentReporter
from memory.report import run_table


def report_memory(
    run: Run,
    comm: Comm,
    device: torch.device,
    folder: Path,
    reporter: Reporter | SilentReporter,
    *,
    memory_gib: float | None,
    num_steps: int,
) -> None:
    """Report the memory that the run takes, in tables, memory.json and memory.png. A collective.

    Args: memory_gib: report the largest batches that fit in so much; None: do not.
        num_steps: real steps to measure, 2 or more; 0: only predict, which needs little memory.
    """
    splits = data.build_splits(run, comm)
    job = describe(run, comm, device, splits)
    if comm.rank == 0 and num_steps:  # the prediction first, in case the real steps do not fit
        reporter.say(run_table(memory.predict(job), None))
    measured = None
    if num_steps:
        trainer = parts.build_trainer(run, comm, device, folder, {}, SilentReporter())
        measured = measure(trainer, num_steps)
    if comm.rank == 0:
        bound = None if memory_gib is None else int(memory_gib * 2**30)
        memory.report(job, memory_bytes=bound, folder=folder, say=reporter.say, measured=measured)
        reporter.say(f"also in {folder}/memory.json and memory.png")
    comm.barrier("predicting on rank 0")


def describe(run: Run, comm: Comm, device: torch.device, splits: Mapping[str, Any]) -> memory.Job:
    """Return the run as a Job of the memory room."""
    train = run.train

    def make_batch(batch_size: int) -> Sequence[Tensor]:
        sized = dataclasses.replace(train, batch_size_per_rank=batch_size)
        batches = data.build_batches(dataclasses.replace(run, train=sized), splits, comm, device)
        return next(batches["train"].start(0, 0, {}))

    return memory.Job(
        make_model=lambda: parts.build_model(run, splits),
        task=parts.build_task(run),
        make_batch=make_batch,
        batch_size=train.batch_size_per_rank,
        optimizer=train.optimizer,
        groups=lambda model: parts.parameter_groups(train, model),
        compression=parts.compression_of(run),
        micro_batches=train.micro_batches_per_step,
        world_size=comm.world_size,
        ranks_per_node=comm.local_size,
        bucket_bytes=parts.bucket_bytes_of(train),
        precision=train.precision,
        device=device,
        is_averaged=train.polyak_decay is not None,
    )


def measure(trainer: Trainer, num_steps: int) -> memory.Measured:
    """Measure real steps at the density after warm-up, and drop their results. A collective."""
    state, batches = trainer.state, endless(trainer)
    state.optimizer.set_epoch(trainer.run.train.num_epochs)
    others = () if state.averaged is None else tuple(state.averaged.parameters())

    def held() -> list[Tensor]:
        return memory.held_by(state.model, state.optimizer, others, state.carried)

    step: Callable[[], Any] = lambda: trainer.train_step(batches)  # noqa: E731
    return memory.measure(
        step, device=state.device, held=held, kept=state.state_bytes, num_steps=num_steps
    )


def endless(trainer: Trainer) -> Iterator[Batch]:
    """Yield the training batches of one epoch after another."""
    epoch = 0
    while True:
        yield from trainer.batches["train"].start(epoch, 0, {})
        epoch += 1
