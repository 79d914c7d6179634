"""The time of a step on four emulated hosts, with every way to exchange gradients in one run.

    python benchmarks/exchange_speed.py --links 100mbit 1gbit 10gbit --json speed.json
    python benchmarks/exchange_speed.py --sweep --links 1gbit        ours by bucket size
    python benchmarks/exchange_speed.py --contenders "no communication" "DDP fp16" "ours 0.1%"

Needs root, 16 GiB of memory for all contenders, and netlab, which gives each rank an emulated host
behind a link of the given rate. There is one job for each link. The contenders train from the same
weights on the same data. In each of `--rounds` rounds they take turns: one step to settle in, then
`--steps` steps that are timed. So what else the machine does falls on all of them.
The time is that of the slowest rank, its median over rounds. `sent` is what the interface of the
busiest host sent in a step of the last round, including Horovod's questions to other ranks. A
contender whose turn takes more than `--limit` seconds drops out, or ends the job if it is on
Horovod. Its row says after how many steps, and the ranks print where their threads stand.
At 100 Mbit/s a dense step takes 12 s or more: take fewer steps there.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks import tables
from benchmarks.exchange_contenders import (
    ALONE,
    CONTENDERS,
    EXTRA,
    FP16,
    SWEEP,
    Contender,
    horovod_for,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
WARM_UP = 3  # steps before a contender's first turn
libc = ctypes.CDLL(None)


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--links", nargs="+", default=["1gbit"], help="rates, as tc writes them")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--netlab", type=tables.path, default=ROOT.parent / "shared" / "netlab")
    parser.add_argument("--contenders", nargs="+", choices=[*CONTENDERS, *EXTRA], metavar="NAME")
    parser.add_argument("--sweep", action="store_true", help="ours with buckets of several sizes")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a turn at most")
    parser.add_argument("--size", type=int, default=2048, help="side of each weight matrix")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="samples a rank")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--interface", default="eth0")
    options = parser.parse_args()
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        work(options)
        return
    rows = [row for link in options.links for row in run_link(options, link)]
    tables.write_json(rows, options.json)


def run_link(options: Any, link: str) -> list[tables.Row]:
    """Run this script on emulated hosts behind links of one rate; print and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        words = [str(options.netlab), str(options.hosts), link, "--"]
        words += "--mca mpi_yield_when_idle 1 -x OMP_NUM_THREADS=1 -x MALLOC_ARENA_MAX=1".split()
        words += [sys.executable, *sys.argv, "--json", str(found)]
        environment = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
        subprocess.run(words, check=True, env=environment)
        rows = [{"link": link, **row} for row in json.loads(found.read_text())]
    print(f"\n{link}, {options.hosts} hosts, {rows[0]['num_steps']} steps")
    tables.print_table(rows, COLUMNS)
    return rows


def work(options: Any) -> None:
    """Be one rank: join the others, take turns, write the rows if it is rank 0, end."""
    names = options.contenders or [*CONTENDERS]
    if options.sweep:
        names = [ALONE, FP16, *SWEEP]
    join(options.interface)
    try:
        turns = [Turns(name, options) for name in names]
        for _ in range(options.rounds):
            for turn in turns:
                turn.take()
        rows = [turn.row() for turn in turns]
        add_ratios(rows)
        if dist.get_rank() == 0:
            tables.write_json(rows, options.json)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    from mpi4py import MPI

    dist.barrier()
    MPI.Finalize()
    os._exit(0)  # a normal exit would wait for the threads of a contender that stalled


def join(interface: str) -> None:
    """Make torch's default group, over gloo, of the ranks that mpirun started.

    MPI is started by mpi4py, so that it outlives hvd.shutdown() and Horovod can start again.
    """
    from mpi4py import MPI

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode())
        SIOCGIFADDR = 0x8915
        address = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    os.environ["MASTER_ADDR"] = MPI.COMM_WORLD.bcast(address)
    os.environ["MASTER_PORT"] = "29511"
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    world = MPI.COMM_WORLD
    dist.init_process_group("gloo", rank=world.Get_rank(), world_size=world.Get_size())


class Turns:
    """One contender's turns, and what was measured in them. All ranks take them together."""

    def __init__(self, name: str, options: Any) -> None:
        self.name, self.options = name, options
        self.num_steps = 0
        self.failure: str | None = None
        self.seconds: list[float] = []
        self.sent_bytes = 0.0
        self._counter = Path(f"/sys/class/net/{options.interface}/statistics/tx_bytes")
        self._task = Task(options)
        kind, settings = (CONTENDERS | EXTRA)[name]
        with horovod_for(kind):
            self.contender = kind(options, **settings)
        libc.malloc_trim(0)

    def take(self) -> None:
        """Take a step to settle in, then `--steps` that are timed."""
        with horovod_for(self.contender):
            self._steps(1 if self.num_steps else WARM_UP)
            measured = self._steps(self.options.steps)
        if not self.failure:
            self.seconds.append(measured[0] / self.options.steps)
            self.sent_bytes = measured[1] / self.options.steps
        libc.malloc_trim(0)  # so that memory freed by this contender does not add to the next one's

    def _steps(self, num_steps: int) -> list[float]:
        """Return the seconds of the slowest rank, and the bytes that the busiest host sent."""
        if self.failure:
            return []
        dist.barrier()
        sent, start = int(self._counter.read_text()), time.perf_counter()
        self._within_limit(num_steps)
        took = time.perf_counter() - start
        dist.barrier()
        sent = int(self._counter.read_text()) - sent
        most = torch.tensor([took, sent, float(self.failure is not None)], dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if most[2]:
            self.failure = self.failure or "failed on another rank"
            if self.contender.needs_horovod:  # all share one Horovod, which cannot shut down now
                raise RuntimeError(f"{self.name} {self.failure}; others cannot go on without it")
        return most.tolist()

    def _within_limit(self, num_steps: int) -> None:
        def steps() -> None:
            try:
                for _ in range(num_steps):
                    self.contender.step(*self._task.batch(self.num_steps))
                    self.num_steps += 1
            except Exception as error:
                self.failure = f"failed after {self.num_steps} steps: {error!r}"

        thread = threading.Thread(target=steps, daemon=True)
        thread.start()
        thread.join(self.options.limit)
        if thread.is_alive():
            self.failure = f"stalled after {self.num_steps} steps"
            where = f"{self.name} {self.failure}; the threads of rank {dist.get_rank()}:"
            print(where, file=sys.stderr, flush=True)
            faulthandler.dump_traceback()

    def row(self) -> tables.Row:
        loss = torch.tensor(float("nan"))
        if not self.failure:
            loss = self._task.evaluate(self.contender)
            dist.all_reduce(loss)
        return {
            "contender": self.name,
            "num_steps": self.num_steps,
            "failure": self.failure,
            "seconds": self.seconds,
            "sent_bytes": self.sent_bytes,
            "payload_bytes": self.contender.payload_bytes,
            "loss": float(loss) / dist.get_world_size(),
        }


class Task:
    """A regression that can be learned: inputs and targets are linear in a few hidden numbers."""

    NUM_HIDDEN = 32

    def __init__(self, options: Any) -> None:
        self._batch, self._rank = options.batch, dist.get_rank()
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.NUM_HIDDEN, options.size)
        self._maps = torch.randn(shape, generator=generator) / self.NUM_HIDDEN**0.5

    def _draw(self, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num, self.NUM_HIDDEN, generator=generator)
        return hidden @ self._maps[0], hidden @ self._maps[1]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's batch of a step: the same for every contender."""
        return self._draw(self._batch, 1000 * (step + 1) + self._rank)

    def evaluate(self, contender: Contender) -> torch.Tensor:
        """Return the loss on samples that were not trained on."""
        inputs, targets = self._draw(64, 0)
        with torch.no_grad():
            return torch.nn.functional.mse_loss(contender.model(inputs), targets)


def add_ratios(rows: list[tables.Row]) -> None:
    """Add to each row its median time, and the ratios to no communication and to DDP in float16."""
    for row in rows:
        row["step_ms"] = 1000 * statistics.median(row["seconds"]) if row["seconds"] else None
    times = {row["contender"]: row["step_ms"] for row in rows}
    for row in rows:
        for key, name in (("times_alone", ALONE), ("times_fp16", FP16)):
            other = times.get(name)
            row[key] = row["step_ms"] / other if row["step_ms"] and other else None


def _number(key: str, form: str) -> Callable[[tables.Row], str]:
    return lambda row: "-" if row["failure"] or row[key] is None else format(row[key], form)


COLUMNS: tables.Columns = {
    "contender": lambda row: row["contender"],
    "ms a step": lambda row: row["failure"] or f"{row['step_ms']:.0f}",
    "fastest, slowest round": lambda row: (
        "-" if row["failure"] else ", ".join(f"{1e3 * f(row['seconds']):.0f}" for f in (min, max))
    ),
    "/ no communication": _number("times_alone", ".2f"),
    "/ DDP fp16": _number("times_fp16", ".3f"),
    "sent a step": _number("sent_bytes", ",.0f"),
    "payload": _number("payload_bytes", ",d"),
    "loss": _number("loss", ".4f"),
}


if __name__ == "__main__":
    main()
