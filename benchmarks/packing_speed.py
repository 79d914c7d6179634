"""How long does a rank work on a bucket's messages: rounding, packing, unpacking, merging?

    OMP_NUM_THREADS=1 python benchmarks/packing_speed.py --json benchmarks/results/packing.json

0.1% of the entries of one tensor, 21 million float32. In each round every operation is done once,
in turn. Ratios are taken within a round, so that what else the machine does falls on all; their
median over rounds is given. "Reference" is the plain torch implementation of the same operation.
In a gather of P ranks, each rank rounds and packs once, unpacks P times and merges P lists.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.turns import COPY, Times, ratio, take_turns
from dgc.wire.codec import Codec
from parsimony_kernels.packing import ops as packing
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES
from parsimony_kernels.step import ops

REFERENCE = ", reference"


def main() -> None:
    options = parse()
    rows = measure(options)
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--numel", type=int, default=21_000_000)
    parser.add_argument("--entries", type=int, default=21_000)
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 64])
    parser.add_argument("--index-coding", choices=INDEX_CODINGS, default="elias_fano")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def entries(options: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Return as many positions, ascending and unique, as were asked for, and values."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(options.numel, (2 * options.entries,), generator=generator).unique()
    chosen = torch.randperm(found.numel(), generator=generator)[: options.entries]
    positions = found[chosen].sort().values
    values = torch.randn(positions.numel(), generator=generator)
    return positions.to(options.device), values.to(options.device)


def operations(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return name -> (operation, bits of an entry of its message, 0 if it makes none)."""
    lists = [entries(options, seed) for seed in range(max(options.workers))]
    positions, values = lists[0]
    work: dict[str, tuple[Callable[[], Any], int]] = {}
    for value_dtype in VALUE_DTYPES:
        codec = Codec(("tensor",), (options.numel,), 1, value_dtype, options.index_coding)
        message = codec.encode(positions, values)
        bits = 8 * message.numel() / positions.numel()
        work[f"round to {value_dtype}"] = (lambda c=codec: c.round_values(values)), 0
        work[f"pack {value_dtype}"] = (lambda c=codec: c.encode(positions, values)), bits
        work[f"unpack {value_dtype}"] = (lambda c=codec, m=message: c.decode_one(m)), bits
    for num in options.workers:
        parts = [list(part) for part in zip(*lists[:num], strict=True)]
        work[f"merge of {num}"] = (lambda parts=parts: packing.merge(*parts)), 0
    return work


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    source = torch.randn(options.numel, device=device)
    target = torch.zeros_like(source)
    work = operations(options)
    timed: dict[str, Callable[[], Any]] = {COPY: lambda: target.copy_(source)}
    for name, (operation, _) in work.items():
        timed[name] = using("native", operation)
        timed[name + REFERENCE] = using("reference", operation)
    times = take_turns(timed, options.rounds, device)
    return [row(name, times, bits, options) for name, bits in
            ((COPY, 0), *((name, bits) for name, (_, bits) in work.items()))]  # fmt: skip


def using(implementation: str, operation: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        with ops.use(implementation):
            operation()

    return call


def row(name: str, times: Times, bits: float, options: argparse.Namespace) -> dict[str, Any]:
    is_copy = name == COPY
    return {
        "operation": name,
        "ms": statistics.median(times[name]),
        "of_copy": ratio(times, name, COPY),
        "reference_ms": None if is_copy else statistics.median(times[name + REFERENCE]),
        "faster_than_reference": None if is_copy else ratio(times, name + REFERENCE, name),
        "bits_per_entry": bits,
        "numel": options.numel,
        "entries": options.entries,
        "index_coding": options.index_coding,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }


def _or_nothing(form: str, value: float | None) -> str:
    return format(value, form) if value else ""


COLUMNS: tables.Columns = {
    "operation": lambda row: row["operation"],
    "ms": lambda row: f"{row['ms']:.3f}",
    "× copy": lambda row: f"{row['of_copy']:.3f}",
    "reference, ms": lambda row: _or_nothing(".2f", row["reference_ms"]),
    "times as fast": lambda row: _or_nothing(".1f", row["faster_than_reference"]),
    "bits an entry": lambda row: _or_nothing(".2f", row["bits_per_entry"]),
}


if __name__ == "__main__":
    main()
