"""Does the time of a row-sparse step grow with the rows of the gradient, not with the table?

    OMP_NUM_THREADS=1 python benchmarks/row_sparse_speed.py --json benchmarks/results/rows.json

An embedding of 200,000 x 256. The gradient of some rows is like one of `nn.Embedding(sparse=True)`:
rows in any order, not yet coalesced. The dense step is one of the same optimizer, with a dense
gradient of the same tensor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import BASELINE, OURS, TORCH, milliseconds, state_bytes

TORCH_PAIR = "Adam, SparseAdam"
COMPARED_ROWS = 2000


def main() -> None:
    parser = tables.parser(__doc__)
    names = [TORCH_PAIR, *OURS]
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names)
    parser.add_argument("--shape", nargs=2, type=int, default=[200_000, 256])
    parser.add_argument("--rows", nargs="+", type=int, default=[500, 1000, 2000, 4000, 8000])
    parser.add_argument("--repeats", type=int, default=5, help="of the dense step; sparse: x 4")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = [measure(name, options) for name in options.optimizers]
    tables.print_table(rows, columns(options.rows))
    tables.write_json(rows, options.json)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    make_dense = TORCH[BASELINE] if name == TORCH_PAIR else OURS[name]
    make_sparse = torch.optim.SparseAdam if name == TORCH_PAIR else OURS[name]
    device = torch.device(options.device)
    parameter = torch.nn.Parameter(torch.randn(options.shape, device=device))
    dense = make_dense([parameter], 1e-3)
    gradient = torch.randn(options.shape, device=device)
    dense_ms = step_ms(dense, parameter, lambda: gradient, options.repeats)
    state = state_bytes(dense)
    dense.state.clear()
    sparse = make_sparse([parameter], 1e-3)
    sparse_ms = {
        count: step_ms(sparse, parameter, lambda count=count: some_rows(count, parameter),
                       4 * options.repeats)
        for count in options.rows
    }  # fmt: skip
    return {
        "optimizer": name,
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "state_bytes_per_parameter": state / parameter.numel(),
        "shape": options.shape,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def step_ms(
    optimizer: torch.optim.Optimizer,
    parameter: torch.nn.Parameter,
    make_gradient: Callable[[], torch.Tensor],
    repeats: int,
) -> float:
    """Return the median time of a step, each on a new gradient; the first two are not counted."""
    times = []
    for _ in range(repeats + 2):
        parameter.grad = make_gradient()
        times.append(milliseconds(optimizer.step, parameter.device))
    parameter.grad = None
    return statistics.median(times[2:])


def some_rows(count: int, parameter: torch.Tensor) -> torch.Tensor:
    num_rows, dim = parameter.shape
    rows = torch.randperm(num_rows, device=parameter.device)[:count]
    values = torch.randn(count, dim, device=parameter.device)
    return torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=False)


def columns(counts: list[int]) -> tables.Columns:
    found: dict[str, Any] = {
        "optimizer": lambda row: row["optimizer"],
        "dense, ms": lambda row: f"{row['dense_ms']:.1f}",
    }
    for count in counts:
        found[f"{count:,} rows"] = lambda row, count=count: f"{row['sparse_ms'][count]:.2f}"
    if COMPARED_ROWS in counts:
        found[f"dense / {COMPARED_ROWS:,} rows"] = lambda row: (
            f"{row['dense_ms'] / row['sparse_ms'][COMPARED_ROWS]:.0f}"
        )
    few, many = min(counts), max(counts)
    found[f"time of {many / few:g} × the rows"] = lambda row: (
        f"{row['sparse_ms'][many] / row['sparse_ms'][few]:.1f}"
    )
    return found


if __name__ == "__main__":
    main()
