"""What the notices by which ranks agree to stop cost a step: steps with and without, in turns.

    horovodrun -np 2 python benchmarks/notices_cost.py

Prints the median seconds of a step of each kind, and their ratio: by turns of ten steps in one run,
so that both see the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from dgc import Compression, DistributedOptimizer
from dgc.comm.job import job
from engine.notices import Notices
from optim import FactoredAdam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40, help="of ten steps each")
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    with job() as comm:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        size = arguments.width
        model = nn.Sequential(*(nn.Linear(size, size) for _ in range(8)))
        optimizer = DistributedOptimizer(
            FactoredAdam(model.parameters(), lr=1e-4, betas=(0.0, 0.999)), model.named_parameters(),
            comm=comm, compression=Compression(density=0.01),
        )  # fmt: skip
        notices, inputs = Notices(comm, ("stop", "interrupt", "written")), torch.randn(64, size)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * arguments.turns):
            for _ in range(10):
                start = time.perf_counter()
                if turn % 2:
                    notices.start(stop=0)
                model(inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if turn % 2:
                    notices.finish()
                if turn >= 4:
                    seconds[bool(turn % 2)].append(time.perf_counter() - start)
        if comm.rank == 0:
            without, with_them = (statistics.median(seconds[kind]) for kind in (False, True))
            print(f"a step without notices {1e3 * without:.2f} ms, with {1e3 * with_them:.2f} ms: "
                  f"{with_them / without:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
