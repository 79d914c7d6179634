"""How many bytes a rank sends in a step, for 4 to 1,024 workers and each protocol.

    OMP_NUM_THREADS=1 python benchmarks/traffic.py --data ../shared/data \
        --json benchmarks/results/traffic.json --picture benchmarks/results/traffic.png

Counted from real selections: every worker reads its own part of WikiText-2, computes gradients of a
word model at the same few parameter vectors (those of a short dense training), adds them to its
residual and selects as in training. Counted are the messages that the codec would write for the
last step's selections. In two levels, the --node-size ranks of a node first sum their gradients,
and each selects from its own part of the sums. Gathers and reductions are taken to go around a
ring, as in dgc.wire.cost.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.simulated import Words
from dgc.selection.plan import plan_sparsity
from dgc.selection.selector import Selector
from dgc.wire.codec import Codec
from dgc.wire.entries import to_owner
from dgc.worker.residual import Compensation
from parsimony_kernels.buffers import ops as buffers

WAYS = ("dense float32", "dense float16", "gather", "sparse all-reduce", "two levels, gather",
        "two levels, sparse all-reduce")  # fmt: skip


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--data", type=tables.path, default=Path("data"),
                        help="folder of wikitext-2/")  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 16, 64, 256, 1024])
    parser.add_argument("--node-size", type=int, default=8)
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--merged-factor", type=float, default=4.0)
    parser.add_argument("--value-dtype", default="mxfp8")
    parser.add_argument("--index-coding", default="elias_fano")
    parser.add_argument("--picture", type=tables.path)
    options = parser.parse_args()
    torch.manual_seed(0)
    flat, nodes, layout, node_layout = collect(options)
    rows = [count(p, flat, nodes, layout, node_layout, options) for p in options.workers]
    print(f"{layout.numel:,} parameters, density {options.density:g}; bytes that one rank sends")
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(rows, options.picture)


@dataclass
class Layout:
    """The compressible tensors, or a local rank's parts of them, joined in one bucket."""

    names: list[str]
    numels: list[int]
    codec: Codec

    @classmethod
    def of(cls, shapes: dict[str, int], parts: int, options: argparse.Namespace) -> Layout:
        numels = [-(-numel // parts) for numel in shapes.values()]
        codec = Codec(tuple(shapes), tuple(numels), value_dtype=options.value_dtype,
                      index_coding=options.index_coding)  # fmt: skip
        return cls(list(shapes), numels, codec)

    @property
    def numel(self) -> int:
        return sum(self.numels)


class Worker:
    """The residuals of one worker, or of a local rank's parts of tensors, and what leaves them."""

    def __init__(self, layout: Layout, density: float) -> None:
        self.layout, self.compensation = layout, Compensation()
        plans = [plan_sparsity(numel, density) for numel in layout.numels]
        self.selectors = [Selector(plan) for plan in plans]

    def step(self, grads: list[Tensor]) -> Tensor:
        """Add gradients; return the positions that are selected."""
        chosen = []
        for name, selector, grad in zip(self.layout.names, self.selectors, grads, strict=True):
            selection = selector.begin(self.compensation.num_steps)
            found = self.compensation.accumulate(name, grad, selection=selection)
            (report,) = buffers.read_reports([found])
            taken = selector.settle(found, report, self.compensation, name)
            chosen.append((taken.indices_K, taken.values_K))
            selector.end_step(stands=True)
        self.compensation.end_step(stands=True)
        return self.layout.codec.join(chosen)[0]


def collect(
    options: argparse.Namespace,
) -> tuple[list[Tensor], list[list[Tensor]], Layout, Layout]:
    """Return the last step's positions by worker, and by node and local rank."""
    task = Words(options.data / "wikitext-2", options.words, options.width, 0)
    task.joined_batch = 2 * max(options.workers)
    model = task.make_model()
    shapes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}
    layout = Layout.of(shapes, 1, options)
    node_layout = Layout.of(shapes, options.node_size, options)
    snapshots = train_a_little(task, model, options.steps)
    flat, nodes, sums = [], [], None
    for rank in range(max(options.workers)):
        grads = list(gradients(task, model, rank, snapshots, options))
        worker = Worker(layout, options.density)
        flat.append([worker.step([g.clone() for g in step]) for step in grads][-1])
        if sums is None:
            sums = grads
        else:
            for total, mine in zip(sums, grads, strict=True):
                for one, other in zip(total, mine, strict=True):
                    one += other
        if rank % options.node_size == options.node_size - 1:
            nodes.append(select_in_node(sums, node_layout, options))
            sums = None
        if sys.stderr.isatty() or rank % 64 == 63:
            print(f"worker {rank + 1}", file=sys.stderr, flush=True)
    return flat, nodes, layout, node_layout


def train_a_little(task: Words, model: nn.Module, num_steps: int) -> list[list[Tensor]]:
    """Return the parameters after each of the last steps of a short dense training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches, snapshots = task.batches(0, max(1, task.joined_batch // 20), seed=1), []
    for step in range(50):
        next(batches)(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 50 - num_steps:
            snapshots.append([p.detach().clone() for p in model.parameters()])
    return snapshots


def gradients(
    task: Words, model: nn.Module, rank: int, snapshots: Any, options: argparse.Namespace
) -> Iterator[list[Tensor]]:
    """Yield one worker's gradients of the compressible tensors, flat, at each snapshot."""
    batches = task.batches(rank, max(options.workers), seed=0)
    for snapshot in snapshots:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), snapshot, strict=True):
                parameter.copy_(value)
        model.zero_grad()
        next(batches)(model)
        yield [p.grad.reshape(-1).clone() for p in model.parameters() if p.dim() > 1]


def select_in_node(
    sums: list[list[Tensor]], layout: Layout, options: argparse.Namespace
) -> list[Tensor]:
    """Return the last step's positions of each local rank, in its part of the node's sums."""
    found = []
    for local_rank in range(options.node_size):
        worker = Worker(layout, options.density)
        for step in sums:
            parts = []
            for total, numel in zip(step, layout.numels, strict=True):
                part = total[local_rank * numel : (local_rank + 1) * numel]
                parts.append(nn.functional.pad(part, (0, numel - part.numel())))
            positions = worker.step(parts)
        found.append(positions)
    return found


def count(
    num_workers: int,
    flat: list[Tensor],
    nodes: list[list[Tensor]],
    layout: Layout,
    node_layout: Layout,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the bytes that a rank sends in each way, averaged over ranks."""
    ring = 2 * (num_workers - 1) / num_workers
    row = {
        "workers": num_workers,
        "entries": sum(len(p) for p in flat[:num_workers]) / num_workers,
        "union": len(torch.cat(flat[:num_workers]).unique()),
        "dense float32": ring * 4 * layout.numel,
        "dense float16": ring * 2 * layout.numel,
        "gather": gather_bytes(flat[:num_workers], layout),
        "sparse all-reduce": sparse_all_reduce_bytes(flat[:num_workers], layout, options),
    }
    num_nodes = num_workers // options.node_size
    if num_nodes > 1:
        bridges = list(zip(*nodes[:num_nodes], strict=True))
        row["two levels, gather"] = mean(gather_bytes(b, node_layout) for b in bridges)
        row["two levels, sparse all-reduce"] = mean(
            sparse_all_reduce_bytes(b, node_layout, options) for b in bridges
        )
    return row


def mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def gather_bytes(positions: Any, layout: Layout) -> float:
    messages = [layout.codec.message_bytes(len(p)) for p in positions]
    return (len(messages) - 1) * sum(messages) / len(messages)


def sparse_all_reduce_bytes(positions: Any, layout: Layout, options: argparse.Namespace) -> float:
    """Count the messages to the owners, and the owners' sums, which go around the ring."""
    num_ranks, codec = len(positions), layout.codec
    shares = [codec.share(owner, num_ranks) for owner in range(num_ranks)]
    given = 0
    for rank, mine in enumerate(positions):
        counts = torch.bincount(to_owner(mine, num_ranks)[0], minlength=num_ranks)
        given += sum(
            shares[owner].message_bytes(k) for owner, k in enumerate(counts.tolist())
            if owner != rank
        )  # fmt: skip
    union = torch.cat(list(positions)).unique()
    summed = torch.bincount(to_owner(union, num_ranks)[0], minlength=num_ranks).tolist()
    k = sum(len(p) for p in positions) / num_ranks
    quota = math.ceil(options.merged_factor * k / num_ranks)
    if options.merged_factor < num_ranks:
        summed = [min(quota, count) for count in summed]
    returned = sum(shares[owner].message_bytes(count) for owner, count in enumerate(summed))
    return (given + (num_ranks - 1) * returned) / num_ranks


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = tables.new_picture()
    for way in WAYS:
        points = [(row["workers"], row[way]) for row in rows if way in row]
        axes.plot(*zip(*points, strict=True), "--" if "dense" in way else "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="bytes that a rank sends a step")
    axes.legend(fontsize=7)
    tables.save_picture(figure, path)


COLUMNS: tables.Columns = {
    "workers": lambda row: f"{row['workers']}",
    "entries of a worker": lambda row: f"{row['entries']:,.0f}",
    "positions of all": lambda row: f"{row['union']:,}",
    **{
        way: lambda row, way=way: f"{row[way]:,.0f}" if way in row else ""
        for way in WAYS
    },
}  # fmt: skip


if __name__ == "__main__":
    main()
