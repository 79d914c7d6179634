"""What a step of many small tensors takes: Python's and torch's work for each, not arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/small_tensors.py --json benchmarks/results/small.json

On a GPU: --device cuda. 1,000 parameters of 8 x 8, dense gradients. In each round every optimizer
makes one step, in turn; the least time of the rounds, and the median ratio to torch's fused Adam
within a round. "Full": as they come, with full state for tensors so small. "Compressed":
min_compressed_numel=0.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import ALL, BASELINE, OURS
from benchmarks.turns import ratio, take_turns

FOREACH = "Adam, foreach"


def optimizer_of(name: str, parameters: list[torch.nn.Parameter], is_compressed: bool) -> Any:
    if name == FOREACH:
        return torch.optim.Adam(parameters, lr=1e-3, foreach=True)
    made = ALL[name](parameters, 1e-3)
    if is_compressed and name in OURS:
        settings = {k: v for k, v in made.defaults.items() if k != "params"}
        made = type(made)(parameters, **{**settings, "min_compressed_numel": 0})
    return made


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--shape", nargs="+", type=int, default=[8, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default="cpu")
    options = parser.parse_args()
    work = {}
    for is_compressed in (False, True):
        for name in [*((BASELINE, FOREACH) if not is_compressed else ()), *OURS]:
            parameters = [torch.nn.Parameter(torch.randn(options.shape, device=options.device))
                          for _ in range(options.tensors)]  # fmt: skip
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer = optimizer_of(name, parameters, is_compressed)
            work[name + (", compressed" if is_compressed else "")] = optimizer.step
    times = take_turns(work, options.rounds, options.device)
    rows = [
        {
            "optimizer": name,
            "microseconds_a_tensor": 1e3 * min(times[name]) / options.tensors,
            "of_adam": ratio(times, name, BASELINE),
        }
        for name in work
    ]
    columns = {
        "optimizer": lambda row: row["optimizer"],
        "us a tensor": lambda row: f"{row['microseconds_a_tensor']:.1f}",
        "x fused Adam": lambda row: f"{row['of_adam']:.2f}",
    }
    tables.print_table(rows, columns)
    tables.write_json(rows, options.json)


if __name__ == "__main__":
    main()
