"""A model of real size, saved in mid-epoch, killed and resumed: seconds, memory, and the same bits.

    OMP_NUM_THREADS=1 python benchmarks/real_size.py --data WIKITEXT-2 --json real-size.json

BERT-Large (configs/bert/large.py, 335 million parameters) on two real ranks, with dense Adam and
with configs/optim/parsimony.py; small batches, so that a step takes seconds. A run is left alone;
another is killed (SIGKILL, all ranks) after its checkpoint in mid-epoch, and resumed. Every tensor
of their last checkpoints must be equal, bit by bit.

Each phase is timed on each rank, also in the processor's time, which other work on the machine
changes less, beside what a script would do with torch alone: `torch.save` of the same values to a
path, then fsync; `torch.load` of the shared file and of its own on every rank, then
`model.load_state_dict`. Files are dropped from the page cache before each is loaded. Memory is how
far the resident memory rose above where the phase began, and how high that was (VmHWM). Blocks of
1 MiB and more go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), or a phase would
use what another has left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from benchmarks import tables
from benchmarks.optimizer_speed import resident
from engine.loop import Trainer

ROOT = Path(__file__).parents[1]
METHODS = {"dense Adam": "configs/optim/adam.py", "parsimony": "configs/optim/parsimony.py"}
RANKS, STEPS, SAVED_STEP = 2, 5, 3
NOT_BITS = {"phase_seconds", "peak_memory_bytes"}  # a checkpoint holds these too


def main() -> None:
    if "--rank-of" in sys.argv:
        run_rank(sys.argv[sys.argv.index("--rank-of") + 1 :])
        return
    options = parse()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work, prefix="real-size-") as work:
        for name in options.methods:
            rows += measure(name, Path(work) / name.replace(" ", "-"), options)
    tables.print_table(summed_up(rows), COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--data", type=tables.path, required=True, help="folder of WikiText-2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=2, help="texts a rank")
    parser.add_argument("--length", type=int, default=32, help="words of a text")
    parser.add_argument("--work", type=tables.path, help="for checkpoints, 25 GiB (default: /tmp)")
    return parser.parse_args()


def measure(name: str, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a method undisturbed, and killed and resumed; return its figures by phase and rank."""
    data = short_data(options.data, work / "data")
    words = [
        "--configs", "configs/bert/large.py", METHODS[name],
        "--configs.model.num_layers", options.layers, "--configs.dataset.root", data,
        "--configs.dataset.name", "wikitext-2", "--configs.dataset.sequence_length", options.length,
        "--configs.train.batch_size_per_rank", options.batch, "--configs.train.num_epochs", 1,
        "--configs.data.samples_per_epoch", STEPS * RANKS * options.batch,
        "--configs.data.num_workers_per_rank", 0, "--configs.checkpoint.every_steps", SAVED_STEP,
    ]  # fmt: skip
    straight, killed = Job(work / "straight", words), Job(work / "killed", words)
    straight.start().wait()
    killed.start().kill_after(SAVED_STEP)
    killed.start().wait()
    result, again = straight.result(), killed.result()
    assert result["parameter_hash"] == again["parameter_hash"], "the parameters differ"
    num_tensors = compare(straight.last_checkpoint(), killed.last_checkpoint())
    print(f"{name}: resumed to the same bits, {num_tensors} tensors", flush=True)
    facts = {"method": name, "tensors_compared": num_tensors} | {
        key: result[key] for key in ("num_parameters", "payload_bytes_per_step", "hardware")
    }
    rows = [facts | row for row in straight.figures() + killed.figures(resumed=True)]
    shutil.rmtree(work)
    return rows


def short_data(source: Path, folder: Path) -> Path:
    """Return WikiText-2 with its training text, and little to evaluate on."""
    folder.mkdir(parents=True)
    (folder / "train.txt").symlink_to((source / "train.txt").resolve())
    for split in ("valid", "test"):
        lines = (source / f"{split}.txt").read_text().splitlines(keepends=True)
        (folder / f"{split}.txt").write_text("".join(lines[:10]))
    return folder


class Job:
    """A run's processes, one start after another."""

    def __init__(self, work: Path, words: list[Any]) -> None:
        self._work, self._starts = work, 0
        self._words = [*map(str, words), "--runs", str(work)]
        work.mkdir(parents=True)

    def start(self) -> Job:
        self._starts += 1
        python = [sys.executable, __file__, "--rank-of", str(self._work / f"start{self._starts}")]
        mpirun = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
                  "--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "--bind-to", "none",
                  "-np", str(RANKS)]  # fmt: skip
        words = [*mpirun, *python, *self._words]
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(words, cwd=ROOT, env=environment)
        return self

    def wait(self) -> None:
        assert self._process.wait() == 0

    def kill_after(self, step: int) -> None:
        """Kill every rank as soon as the checkpoint of this step is whole."""
        while not list(self._work.glob(f"*/checkpoints/step-{step:08d}.json")):
            assert self._process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        for pid in self._work.glob(f"start{self._starts}.rank*.pid"):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        self._process.wait()

    def _folder(self) -> Path:
        (folder,) = (path.parent for path in self._work.glob("*/checkpoints"))
        return folder

    def result(self) -> dict[str, Any]:
        return json.loads((self._folder() / "result.json").read_text())

    def last_checkpoint(self) -> Path:
        return max((self._folder() / "checkpoints").glob("*.json"))

    def figures(self, resumed: bool = False) -> list[dict[str, Any]]:
        """Return what the ranks of the last start measured."""
        files = sorted(self._work.glob(f"start{self._starts}.rank*.figures"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if resumed == ("resum" in line["phase"])]


def compare(one: Path, other: Path) -> int:
    """Refuse checkpoints that differ in a bit; return how many tensors they have."""
    num_tensors = 0
    for name in json.loads(one.read_text())["parts"]:
        parts = [torch.load(f.parent / name, mmap=True, weights_only=True) for f in (one, other)]
        for part in (*parts, *(part.get("progress", {}) for part in parts)):
            for key in NOT_BITS & part.keys():
                del part[key]
        leaves = [tree_leaves(part) for part in parts]
        for a, b in zip(*leaves, strict=True):
            num_tensors += torch.is_tensor(a)
            assert same_bits(a, b) if torch.is_tensor(a) else a == b, f"{name} differs"
    return num_tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def run_rank(arguments: list[str]) -> None:
    """Be one rank of train.py, with a look at its phases."""
    figures, *words = arguments
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    Path(f"{figures}.rank{rank}.pid").write_text(str(os.getpid()))
    watch(Phases(rank, Path(f"{figures}.rank{rank}.figures")), Path(f"{figures}.rank{rank}.plain"))
    sys.argv = ["train.py", *words]
    train.main()


class Phases:
    """One rank's figures, a line a phase."""

    def __init__(self, rank: int, file: Path) -> None:
        self._rank, self._file = rank, file

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until now
        before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        peak = resident("VmHWM")
        row = {"phase": phase, "rank": self._rank, "seconds": seconds, "cpu_seconds": cpu,
               "above_start_bytes": peak - before, "peak_bytes": peak}  # fmt: skip
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def watch(phases: Phases, plain: Path) -> None:
    """Have the trainer's phases measured, and what a script would do in their place."""
    train.build_trainer = during(phases, "start: build", train.build_trainer)
    Trainer.train_step = during(phases, "step", Trainer.train_step)
    resume, save = Trainer._resume, Trainer._save

    def resume_and_compare(trainer: Trainer) -> None:
        if not list(trainer.checkpoints._folder.glob("*.json")):
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
        for is_plain in (True, False, True):  # as a machine with other work has its moods
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
    """Read both parts on every rank; the optimizer would take up the tensors that were read."""
    last = max(trainer.checkpoints._folder.glob("*.json"))
    own = f"{last.stem}.rank-{trainer.comm.rank:04d}-of-{RANKS:04d}.pt"
    parts = [torch.load(last.parent / name, map_location="cpu", weights_only=True)
             for name in (f"{last.stem}.shared.pt", own)]  # fmt: skip
    trainer.state.model.load_state_dict(parts[0]["model"])


def drop_from_cache(trainer: Trainer) -> None:
    if trainer.comm.rank == 0:
        for file in trainer.checkpoints._folder.glob("*.pt"):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
    trainer.comm.barrier()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def summed_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a phase: of rank 0, which has most to do, all times; the most memory of any."""
    found = []
    for method, phase in dict.fromkeys((row["method"], row["phase"]) for row in rows):
        same = [row for row in rows if (row["method"], row["phase"]) == (method, phase)]
        first = [row for row in same if row["rank"] == 0]
        most = {key: max(row[key] for row in same) for key in ("above_start_bytes", "peak_bytes")}
        times = {key: [row[key] for row in first] for key in ("seconds", "cpu_seconds")}
        found.append({"method": method, "phase": phase, **times, **most})
    return found


def _each(seconds: list[float]) -> str:
    return ", ".join(f"{s:.1f}" for s in seconds)


COLUMNS: tables.Columns = {
    "method": lambda row: row["method"],
    "phase": lambda row: row["phase"],
    "seconds, each time": lambda row: _each(row["seconds"]),
    "of a core": lambda row: _each(row["cpu_seconds"]),
    "memory above its start, GiB": lambda row: f"{row['above_start_bytes'] / 2**30:.2f}",
    "at its peak": lambda row: f"{row['peak_bytes'] / 2**30:.2f}",
}


if __name__ == "__main__":
    main()
