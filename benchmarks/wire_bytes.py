"""Does the network carry as many bytes as we count? Run on emulated hosts, with one rank each.

    ../shared/netlab 2 1gbit -- python benchmarks/wire_bytes.py --json wire.json

Exchanges random gradients. Compares the bytes that the network interface of rank 0 sent with the
ring volume: the payload that the run counts, times how often a ring sends it. In an all-reduce over
P hosts, a ring sends 2 (P - 1) / P of the buffer; in a gather, P - 1 times the message. "Dense /
interface" is the size of the gradient in float32, divided by what the interface sent of it to one
other host.
Horovod's ranks also ask each other what is ready: by default every millisecond, which makes some 60
kB a second even if nothing happens. Here they ask seldom (HOROVOD_CYCLE_TIME, in ms), so that this
does not hide what is measured.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from dgc import Compression, DistributedOptimizer
from dgc.comm import Comm, horovod_job

FLOAT16 = {"value_dtype": "float16"}
GATHER = {"density": 0.001, "protocol": "gather", "index_coding": "elias_fano"}
CASES = {
    "dense": None,
    "density 1%": Compression(density=0.01),
    "density 1%, float16": Compression(density=0.01, **FLOAT16),
    "density 0.1%": Compression(density=0.001),
    "density 0.1%, float16": Compression(density=0.001, **FLOAT16),
    "density 0.1%, mxfp8, Elias-Fano": Compression(value_dtype="mxfp8", **GATHER),
    "density 0.1%, mxfp4, Elias-Fano": Compression(value_dtype="mxfp4", **GATHER),
}


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--interface", default="eth0")
    parser.add_argument("--size", type=int, default=1024, help="side of each weight matrix")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--bucket-mib", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "100")
    counter = Path(f"/sys/class/net/{options.interface}/statistics/tx_bytes")
    with horovod_job() as comm:
        rows = [measure(comm, name, CASES[name], counter, options) for name in CASES]
        if comm.rank == 0:
            print(f"{comm.world_size} hosts; bytes that one of them sent")
            tables.print_table(rows, COLUMNS)
            tables.write_json(rows, options.json)


def measure(
    comm: Comm, name: str, compression: Compression | None, counter: Path, options: Any
) -> dict[str, Any]:
    """Exchange `steps` gradients; return the bytes counted by us and by the interface."""
    shape = (options.size, options.size)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(options.layers)]
    named = [(f"{name}.{i}", w) for i, w in enumerate(weights)]
    optimizer = DistributedOptimizer(
        torch.optim.SGD(weights, lr=0.1, momentum=0.9), named, comm=comm, compression=compression,
        bucket_bytes=int(options.bucket_mib * 2**20),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(comm.rank)
    gathered = reduced = 0
    comm.barrier()
    start_bytes, start = int(counter.read_text()), time.perf_counter()
    for _ in range(options.steps):
        sum((w * torch.randn(shape, generator=generator)).sum() for w in weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        gathered += optimizer.stats.sparse_bytes
        reduced += optimizer.stats.dense_bytes
    seconds = time.perf_counter() - start
    comm.barrier()  # until the others have it, some of it may not have left the interface
    sent = int(counter.read_text()) - start_bytes
    others = comm.world_size - 1
    return {
        "case": name,
        "payload_bytes": gathered + reduced,
        "ring_bytes": gathered * others + reduced * 2 * others / comm.world_size,
        "interface_bytes": sent,
        "dense_bytes": 4 * options.steps * options.layers * options.size**2,
        "seconds": seconds,
    }


def passes(row: dict[str, Any]) -> float:
    """Return how often a ring sends a byte of the payload."""
    return row["ring_bytes"] / row["payload_bytes"]


COLUMNS: tables.Columns = {
    "case": lambda row: row["case"],
    "payload": lambda row: f"{row['payload_bytes']:,}",
    "ring volume of it": lambda row: f"{row['ring_bytes']:,.0f}",
    "interface": lambda row: f"{row['interface_bytes']:,}",
    "dense / interface, a rank": lambda row: (
        f"{row['dense_bytes'] * passes(row) / row['interface_bytes']:,.0f}"
    ),
    "interface / ring volume": lambda row: f"{row['interface_bytes'] / row['ring_bytes']:.3f}",
}


if __name__ == "__main__":
    main()
