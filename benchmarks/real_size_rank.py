"""One rank of real_size.py: train.py, whose phases are measured beside plain torch.

    python benchmarks/real_size_rank.py FIGURES <arguments of train.py>

Started by mpirun. Writes FIGURES.rank<rank>.figures, and .pid with the number of its process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from benchmarks.resident import forget_peak, resident
from engine.loop import Trainer


def main() -> None:
    """Run train.py, and measure its phases."""
    figures, *words = sys.argv[1:]
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    Path(f"{figures}.rank{rank}.pid").write_text(str(os.getpid()))
    watch(Phases(rank, Path(f"{figures}.rank{rank}.figures")), Path(f"{figures}.rank{rank}.plain"))
    sys.argv = ["train.py", *words]
    train.main()


class Phases:
    """Measures phases of this rank, and writes a line of figures for each."""

    def __init__(self, rank: int, file: Path) -> None:
        self._rank, self._file = rank, file

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        forget_peak()
        before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resident("VmHWM")
        row = {"phase": phase, "rank": self._rank, "seconds": seconds, "cpu_seconds": cpu,
               "above_start_bytes": peak - before, "peak_bytes": peak}  # fmt: skip
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def watch(phases: Phases, plain: Path) -> None:
    """Let phases of the trainer be measured, and beside them what a script would do."""
    train.build_trainer = during(phases, "start: build", train.build_trainer)
    Trainer.train_step = during(phases, "step", Trainer.train_step)
    resume, save = Trainer._resume, Trainer._save

    def resume_and_compare(trainer: Trainer) -> None:
        if not list(trainer.checkpoints.path.glob("*.json")):
            with phases("start: agree on the model"):
                resume(trainer)
            return
        plainly = "torch.load, to resume", load_plainly
        for phase, load in (plainly, plainly, ("resume", resume)):
            drop_from_cache(trainer)
            with phases(phase):
                load(trainer)
                trainer.comm.barrier()

    def save_and_compare(trainer: Trainer, *, is_best: bool) -> None:
        for is_plain in (True, False, True):  # before and after, since the machine's speed varies
            if not is_plain:
                with phases("save"):
                    save(trainer, is_best=is_best)
            elif not is_best:
                save_plainly(trainer, phases, plain)

    Trainer._resume, Trainer._save = resume_and_compare, save_and_compare


def during(phases: Phases, phase: str, do: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*arguments: Any, **settings: Any) -> Any:
        with phases(phase):
            return do(*arguments, **settings)

    return measured


def save_plainly(trainer: Trainer, phases: Phases, plain: Path) -> None:
    files = {plain.with_suffix(".own"): trainer.state.worker()}
    if trainer.comm.rank == 0:
        files[plain.with_suffix(".shared")] = trainer.state.shared()
    with phases("torch.save"):
        for file, content in files.items():
            torch.save(content, file)
        trainer.comm.barrier()
    with phases("fsync after torch.save"):
        for file in files:
            sync(file)
        trainer.comm.barrier()
    for file in files:
        file.unlink()


def load_plainly(trainer: Trainer) -> None:
    """Read both files and load the model, on every rank. (An optimizer keeps the tensors read.)"""
    last = max(trainer.checkpoints.path.glob("*.json"))
    own = f"{last.stem}.rank-{trainer.comm.rank:04d}-of-{trainer.comm.world_size:04d}.pt"
    parts = [torch.load(last.parent / name, map_location="cpu", weights_only=True)
             for name in (f"{last.stem}.shared.pt", own)]  # fmt: skip
    trainer.state.model.load_state_dict(parts[0]["model"])


def drop_from_cache(trainer: Trainer) -> None:
    if trainer.comm.rank == 0:
        for file in trainer.checkpoints.path.glob("*.pt"):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    trainer.comm.barrier()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


if __name__ == "__main__":
    main()
