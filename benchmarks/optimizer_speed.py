"""How long does a dense step take, and how much memory does it need?

    OMP_NUM_THREADS=1 python benchmarks/optimizer_speed.py --json benchmarks/results/step.json

One tensor, 4096 x 2048 float32. In each round every optimizer makes one step, in turn. Ratios are
taken within a round, so that what else the machine does falls on all; their median over rounds is
given. "Reference" is the plain torch implementation of the same operation.
"Share of a copy's speed": the bytes that a step must read and write (parameter, gradient, state) in
a second, divided by those of `Tensor.copy_`. "Temporary": the most that a further step adds to the
memory of a process started for that, or, on a GPU, to what torch has allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import ALL, BASELINE, state_bytes
from benchmarks.resident import forget_peak, resident, spawn_peak
from benchmarks.turns import COPY, Times, ratio, take_turns
from parsimony_kernels.step import ops

REFERENCE = ", reference"
REFERENCES = ("SM3", "FactoredAdam, beta1 = 0", "CMS, beta1 = 0", "CS-MV")
MEBIBYTE = 2**20


def main() -> None:
    options = parse()
    if options.peak_of:
        print(peak_bytes(options.peak_of, options))
        return
    names = options.optimizers
    if BASELINE not in names:
        names = [BASELINE, *names]
    rows = measure(names, options)
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    names = [*ALL, *(name + REFERENCE for name in REFERENCES)]
    parser = tables.parser(__doc__)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # the process that measures memory
    return parser.parse_args()


@dataclass
class Contender:
    """One optimizer on a tensor of its own."""

    parameter: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    implementation: str

    def step(self) -> None:
        with ops.use(self.implementation):
            self.optimizer.step()


def contender(name: str, options: argparse.Namespace) -> Contender:
    generator = torch.Generator().manual_seed(1)
    values, gradient = (torch.randn(options.shape, generator=generator) for _ in range(2))
    parameter = torch.nn.Parameter(values.to(options.device))
    parameter.grad = gradient.to(options.device)
    optimizer = ALL[name.removesuffix(REFERENCE)]([parameter], 1e-3)
    return Contender(parameter, optimizer, "reference" if name.endswith(REFERENCE) else "native")


def measure(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    contenders = {name: contender(name, options) for name in names}
    source = torch.randn(options.shape, device=device)
    target = torch.zeros_like(source)
    work = {name: each.step for name, each in contenders.items()}
    work |= {COPY: lambda: target.copy_(source)}
    times = take_turns(work, options.rounds, device)
    size = source.numel()
    rows = [row(COPY, times, 0, 0, 8 * size, options)]
    for name, each in contenders.items():
        state = state_bytes(each.optimizer)
        peak = peak_bytes(name, options, each) if device.type == "cuda" else spawn_peak(name)
        rows.append(row(name, times, state, peak, 12 * size + 2 * state, options))
    return rows


def row(
    name: str, times: Times, state: int, peak: int, traffic: int, options: argparse.Namespace
) -> dict[str, Any]:
    size = options.shape[0] * options.shape[1]
    return {
        "optimizer": name,
        "ms": statistics.median(times[name]),
        "of_adam": ratio(times, name, BASELINE),
        "of_copy": ratio(times, name, COPY),
        "share_of_copy_speed": traffic / (8 * size) / ratio(times, name, COPY),
        "state_bytes_per_parameter": state / size,
        "temporary_bytes": peak,
        "shape": options.shape,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }


def peak_bytes(name: str, options: argparse.Namespace, each: Contender | None = None) -> int:
    """Return the most memory that one step adds while it runs."""
    if each is None:
        each = contender(name, options)
        for _ in range(2):
            each.step()
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        each.step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    before = resident("VmRSS")
    each.step()
    return max(0, resident("VmHWM") - before)


COLUMNS: tables.Columns = {
    "optimizer": lambda row: row["optimizer"],
    "ms": lambda row: f"{row['ms']:.1f}",
    "× fused Adam": lambda row: f"{row['of_adam']:.2f}",
    "× copy": lambda row: f"{row['of_copy']:.1f}",
    "share of a copy's speed": lambda row: f"{row['share_of_copy_speed']:.0%}",
    "state bytes a parameter": lambda row: f"{row['state_bytes_per_parameter']:.3f}",
    "temporary MiB": lambda row: f"{row['temporary_bytes'] / MEBIBYTE:.1f}",
}


if __name__ == "__main__":
    main()
