"""Train a model of real size: save it in mid-epoch, kill it, resume it to the same bits.

    OMP_NUM_THREADS=1 python benchmarks/real_size.py --data WIKITEXT-2 --json real-size.json

BERT-Large (configs/bert/large.py, 335 million parameters) on two real ranks, with dense Adam and
with configs/optim/parsimony.py; batches are small, so that a step takes seconds. One run is left
alone. Another is killed (SIGKILL, all ranks) after its checkpoint in mid-epoch, and resumed. Every
tensor of their last checkpoints must be equal, bit by bit.

Each phase is measured on each rank: its time, the time of the processor, which other work on the
machine changes less, and its memory. Beside it stands what a script would do with torch alone:
`torch.save` of the same values and fsync; `torch.load` of the shared file and of the rank's own on
every rank, and `model.load_state_dict`. Files are dropped from the page cache before each is
loaded. Memory is how far the resident memory rose above where the phase began, and its peak
(VmHWM). Blocks of 1 MiB and more go back to the system when they are freed
(MALLOC_MMAP_THRESHOLD_); otherwise a phase would use the memory that another one has freed.
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
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables

ROOT = Path(__file__).parents[1]
RANK = str(ROOT / "benchmarks/real_size_rank.py")
METHODS = {"dense Adam": "configs/optim/adam.py", "parsimony": "configs/optim/parsimony.py"}
RANKS, STEPS, SAVED_STEP = 2, 5, 3
NOT_BITS = {"phase_seconds", "peak_memory_bytes"}  # keys of a checkpoint that differ between runs


def main() -> None:
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
    """Run a method once undisturbed, once killed and resumed; return figures by phase and rank."""
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
    """Return a folder with WikiText-2's training text, and only little text for evaluation."""
    folder.mkdir(parents=True)
    (folder / "train.txt").symlink_to((source / "train.txt").resolve())
    for split in ("valid", "test"):
        lines = (source / f"{split}.txt").read_text().splitlines(keepends=True)
        (folder / f"{split}.txt").write_text("".join(lines[:10]))
    return folder


class Job:
    """A run that can be started several times, and its files."""

    def __init__(self, work: Path, words: list[Any]) -> None:
        self._work, self._starts = work, 0
        self._words = [*map(str, words), "--runs", str(work)]
        work.mkdir(parents=True)

    def start(self) -> Job:
        self._starts += 1
        python = [sys.executable, RANK, str(self._work / f"start{self._starts}")]
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


def summed_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each phase: all times of rank 0, which does most, and the most memory of any
    rank."""
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
