"""How much memory a worker keeps and how much it needs at its peak, and how long a step takes.

    OMP_NUM_THREADS=1 python benchmarks/step_memory.py --json benchmarks/results/step-memory.json

A network of linear layers with 16.8 million parameters, and a batch so small that activations do
not count. Kept: the live tensors when `step` is over, gradients included. Peak: by how much the
resident memory of a process rises within a step, gradients included. The parameters are in neither.
Time: forward, backward, selection and update of a single worker, so without communication; each
method takes turns with dense Adam.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.compressed_methods import ALL, METHODS
from benchmarks.compressed_worker import state_bytes
from benchmarks.resident import forget_peak, resident, spawn_peak
from dgc import DistributedOptimizer
from dgc.comm.local import LocalComm, run_local

BASELINE = "dense Adam"
DEFAULT = [
    *METHODS,
    "DGC-SGD, bf16 residual and velocity",
    "DGC-SGD, 8-bit residual and velocity",
]


def main() -> None:
    options = parse()
    if options.peak_of:
        print(run_local(1, lambda comm: peak_bytes(Worker(comm, options.peak_of, options)))[0])
        return
    rows = run_local(1, lambda comm: measure(comm, options))[0]
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=ALL, default=DEFAULT)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # the process that measures memory
    return parser.parse_args()


class Worker:
    """One method's model and optimizer."""

    def __init__(self, comm: LocalComm, name: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(options.width, options.width) for _ in range(options.layers)]
        self.name, self.model = name, nn.Sequential(*layers)
        method = ALL[name]
        self.optimizer = DistributedOptimizer(
            method.optimizer(self.model, 1e-5), self.model.named_parameters(), comm=comm,
            compression=method.compression(options.density, None),
        )  # fmt: skip
        self.optimizer.set_density(1.0 if method.sent is None else options.density)
        self.inputs = torch.randn(4, options.width)

    def step(self) -> None:
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()

    def timed_step(self) -> float:
        start = time.perf_counter()
        self.step()
        seconds = time.perf_counter() - start
        self.optimizer.zero_grad()
        return 1e3 * seconds


def measure(comm: LocalComm, options: argparse.Namespace) -> list[dict[str, Any]]:
    names = list(dict.fromkeys([BASELINE, *options.methods]))
    rows: list[dict[str, Any]] = []
    for name in names:  # beside the baseline, so that what else the machine does falls on both
        base, worker = Worker(comm, BASELINE, options), Worker(comm, name, options)
        times = [(base.timed_step(), worker.timed_step()) for _ in range(options.rounds + 2)][2:]
        worker.step()
        rows.append(
            {
                "method": name,
                "num_parameters": sum(p.numel() for p in worker.model.parameters()),
                "state_bytes": state_bytes(worker.optimizer, worker.model),
                "payload_bytes": worker.optimizer.stats.payload_bytes,
                "step_ms": statistics.median(mine for _, mine in times),
                "steps_of_adam": statistics.median(mine / theirs for theirs, mine in times),
                "phase_ms": {k: 1e3 * s for k, s in worker.optimizer.stats.seconds.items()},
                "peak_bytes": spawn_peak(name),
                "hardware": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            }
        )
    return rows


def peak_bytes(worker: Worker) -> int:
    """Return the peak of a step above the memory of a process with only the parameters."""
    for _ in range(3):
        worker.timed_step()
    kept = sum(state_bytes(worker.optimizer, worker.model).values())
    forget_peak()
    before = resident("VmRSS") - kept
    worker.step()
    return resident("VmHWM") - before


COLUMNS: tables.Columns = {
    "method": lambda row: row["method"],
    "kept, bytes a parameter": lambda row: _each(row, sum(row["state_bytes"].values())),
    "of them gradient, residual, velocity, statistics, optimizer": lambda row: ", ".join(
        _each(row, row["state_bytes"][kind])
        for kind in ("gradients", "residual", "velocity", "statistics", "optimizer")
    ),
    "at the peak of a step": lambda row: _each(row, row["peak_bytes"]),
    "dense / sent": lambda row: f"{4 * row['num_parameters'] / row['payload_bytes']:.0f}",
    "step, in dense Adam's": lambda row: f"{row['steps_of_adam']:.2f}",
    "ms": lambda row: f"{row['step_ms']:.0f}",
}


def _each(row: dict[str, Any], num_bytes: int) -> str:
    return f"{num_bytes / row['num_parameters']:.2f}"


if __name__ == "__main__":
    main()
