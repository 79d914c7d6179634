"""How long does a dense step take, and what memory does it need? Ratios in one process.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_speed.py --json benchmarks/results/step.json

One tensor, 4096 x 2048 float32. In each round every optimizer makes one step, in turn, and ratios
are taken within the round, so that what else the machine does falls on all of them; the median of
the rounds is given. "Reference" is the plain torch implementation of the same operation.
Share of a copy's speed: the bytes that a step must read and write (parameter, gradient, state) a
second, over those of `Tensor.copy_`. Temporary memory: the most that one more step adds to the
process (its own, started for that) or, on a GPU, to what torch has allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import ALL, BASELINE, milliseconds, state_bytes
from parsimony_kernels.step import ops

COPY = "copy of the tensor"
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
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-2, options.rounds):
        for name, step in work.items():
            time = milliseconds(step, device)
            if number >= 0:  # the first rounds make the state and warm up
                times[name].append(time)
    size = source.numel()
    rows = [row(COPY, times, 0, 0, 8 * size, options)]
    for name, each in contenders.items():
        state = state_bytes(each.optimizer)
        peak = peak_bytes(name, options, each) if device.type == "cuda" else spawn_peak(name)
        rows.append(row(name, times, state, peak, 12 * size + 2 * state, options))
    return rows


def row(
    name: str,
    times: dict[str, list[float]],
    state: int,
    peak: int,
    traffic: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    size = options.shape[0] * options.shape[1]
    return {
        "optimizer": name,
        "ms": statistics.median(times[name]),
        "of_adam": ratio(BASELINE),
        "of_copy": ratio(COPY),
        "share_of_copy_speed": traffic / (8 * size) / ratio(COPY),
        "state_bytes_per_parameter": state / size,
        "temporary_bytes": peak,
        "shape": options.shape,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }


# ---- memory -------------------------------------------------------------------------------------


def spawn_peak(name: str) -> int:
    """Measure in a fresh process, whose allocator returns what is freed at once."""
    words = [sys.executable, *sys.argv, "--peak-of", name]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(words, env=os.environ | settings, check=True, stdout=subprocess.PIPE)
    return int(done.stdout.split()[-1])


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
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until now
    before = resident("VmRSS")
    each.step()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


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
