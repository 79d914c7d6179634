"""Does a step of a million words cost what it touches? From lookup to update, on 1 and 2 workers.

    OMP_NUM_THREADS=1 python benchmarks/large_vocabulary.py \
        --json benchmarks/results/large-vocabulary.json

An LSTM with an embedding and a sampled softmax, each 1,000,000 x 64, gradients row-sparse, on real
Horovod ranks, which this starts; half an hour on two busy cores. Texts are words drawn uniformly,
so that nearly each is another row. Cases and vocabularies take turns, so that the machine's own ups
and downs cancel; times are medians. "processor" is the time of this rank's main thread, which does
not count while another program has the core: ratios are of it. Rows: of embedding and softmax
weight, over all ranks, which is what each rank's update touches. Kept: the optimizer's state. Peak:
by how much the resident memory of a rank rises within a step, in jobs of their own, with all state
touched before; of exchange and update: after backward. Dense: the same step with sparse=False, few
times.

1,000,000 words are tried with texts of all of them, and with texts of the first 100,000: what the
second costs above a vocabulary of 100,000 is work over whole tables, what the first costs above the
second is memory that is farther apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import OURS, state_bytes
from benchmarks.optimizer_speed import resident
from dgc import DistributedOptimizer, row_sparse_names
from dgc.comm import Comm, horovod_job
from workloads.language_models import LSTMLanguageModel

OPTIMIZERS = ["Adam, full, ours", "CS-MV", "CS-V", "SM3", "CS-momentum"]
CASES = [(8, 512), (32, 512), (128, 512), (512, 512), (8, 8192)]  # texts a rank, sampled words
DENSE_ROUNDS = 3
MEBIBYTE = 2**20
PEAKS = ("peak_bytes", "update_peak_bytes")
PHASES = {
    "forward": ["forward"],
    "backward": ["backward"],
    "exchange": ["compensate", "select", "pack", "merge"],
    "wait": ["wait"],
    "update": ["optimizer"],
}


def main() -> None:
    options = parse()
    if options.job:
        with horovod_job() as comm:
            rows = work(comm, options)
            if comm.rank == 0:
                tables.write_json(rows, options.json)
        return
    rows = [row for num in options.workers for row in measure(num, options)]
    tables.print_table(rows, COLUMNS)
    tables.print_table(summaries(rows, options), SUMMARY)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--optimizers", nargs="+", choices=[*OURS], default=OPTIMIZERS)
    parser.add_argument("--dense", nargs="*", choices=[*OURS], default=["Adam, full, ours", "SM3"],
                        help="those to try with dense gradients, too")  # fmt: skip
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--words", nargs=2, type=int, default=[1_000_000, 100_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--positions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--job", choices=["time", "memory"], help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- jobs ----------------------------------------------------------------------------------------


def measure(num_workers: int, options: argparse.Namespace) -> list[tables.Row]:
    """Run both jobs of as many ranks; return the rows of the first with the peaks of the second."""
    rows, peaks = (run_job(num_workers, job) for job in ("time", "memory"))
    for row, peak in zip(rows, peaks, strict=True):
        assert all(row[key] == peak[key] for key in ("optimizer", "words", "drawn_from", "texts"))
        row.update({key: peak[key] for key in PEAKS})
    return rows


def run_job(num_workers: int, job: str) -> list[tables.Row]:
    environment = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    if job == "memory":  # freed memory goes back to the system at once
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        words = ["horovodrun", "-np", str(num_workers), "-H", f"localhost:{num_workers}",
                 sys.executable, *sys.argv, "--job", job, "--json", str(found)]  # fmt: skip
        subprocess.run(words, check=True, env=environment, stdout=sys.stderr)
        return json.loads(found.read_text())


def work(comm: Comm, options: argparse.Namespace) -> list[tables.Row]:
    """Be one rank of a job: every optimizer with every case, then some with dense gradients."""
    many, few = options.words
    rows: list[tables.Row] = []
    for name in options.optimizers:
        start = time.perf_counter()
        workers = {num: Worker(comm, name, num, options) for num in (many, few)}
        plans = [
            Plan(workers[num], drawn_from, *case)
            for case in CASES
            for num, drawn_from in ((many, many), (many, few), (few, few))
        ]
        rows += run(plans, options.rounds, options)
        del workers, plans
        gc.collect()
        if name in options.dense:
            rows += run(
                [Plan(Worker(comm, name, many, options, dense=True), many, *CASES[0])],
                DENSE_ROUNDS,
                options,
            )
            gc.collect()
        if comm.rank == 0:
            print(f"{options.job}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


class Worker:
    """One optimizer's model of so many words."""

    def __init__(
        self,
        comm: Comm,
        name: str,
        num_words: int,
        options: argparse.Namespace,
        dense: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.comm, self.name, self.num_words, self.is_dense = comm, name, num_words, dense
        self.positions = options.positions
        self.model = LSTMLanguageModel(
            num_words, options.dim, options.dim, num_layers=1, dropout=0.0, softmax="sampled",
            sparse_embedding=True,
        )  # fmt: skip
        if dense:
            for table in (self.model.embedding, self.model.softmax.weight, self.model.softmax.bias):
                table.sparse = False
        self.optimizer = DistributedOptimizer(
            OURS[name](self.model.parameters(), 1e-3), self.model.named_parameters(), comm=comm,
            row_sparse=row_sparse_names(self.model),
        )  # fmt: skip
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor += 0  # a page that nobody has written is not there yet
        self.generator = torch.Generator().manual_seed(comm.rank)
        torch.manual_seed(1 + comm.rank)  # of the sampled words

    def texts(self, num: int, drawn_from: int) -> torch.Tensor:
        return torch.randint(drawn_from, (self.positions + 1, num), generator=self.generator)


class Plan:
    """Steps of one case, in turn with those of others."""

    def __init__(self, worker: Worker, drawn_from: int, texts: int, samples: int) -> None:
        self.worker, self.drawn_from, self.texts, self.samples = worker, drawn_from, texts, samples
        self.found: dict[str, list[float]] = defaultdict(list)

    def step(self, watched: str | None) -> None:
        """Make a step, and note its "time" or "memory"."""
        model, optimizer = self.worker.model, self.worker.optimizer
        model.softmax.num_samples = self.samples
        texts = self.worker.texts(self.texts, self.drawn_from)
        gc.collect()
        self.worker.comm.barrier()
        if watched == "memory":
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until now
        start, cpu = time.perf_counter(), time.thread_time()
        loss = model(texts[:-1], texts[1:])[0]
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        if watched == "memory":
            of_model = resident("VmHWM") - before
            Path("/proc/self/clear_refs").write_text("5")
        optimizer.step()
        end = time.perf_counter()
        if watched == "memory":
            of_update = resident("VmHWM") - before
            self.found["update_peak_bytes"].append(of_update)
            self.found["peak_bytes"].append(max(of_model, of_update))
        stats, found = optimizer.stats, self.found
        gradients = [p.grad for p in (model.embedding.weight, model.softmax.weight.weight)]
        num_rows = sum(g._nnz() if g.is_sparse else len(g) for g in gradients)
        del gradients, loss
        optimizer.zero_grad()
        if watched is None:
            return
        found["cpu"].append(time.thread_time() - cpu)
        found["seconds"].append(end - start)
        found["rows"].append(num_rows)
        found["sent"].append(stats.payload_bytes)
        in_hooks = sum(stats.seconds.get(phase, 0.0) for phase in ("compensate", "select", "pack"))
        phases = {**stats.seconds, "forward": forward - start,
                  "backward": backward - forward - in_hooks}  # fmt: skip
        for phase, parts in PHASES.items():
            found[phase].append(sum(phases.get(part, 0.0) for part in parts))

    def row(self) -> tables.Row:
        worker = self.worker
        middle = {key: statistics.median(values) for key, values in self.found.items()}
        return {
            "workers": worker.comm.world_size,
            "optimizer": worker.name,
            "gradients": "dense" if worker.is_dense else "row-sparse",
            "words": worker.num_words,
            "drawn_from": self.drawn_from,
            "texts": self.texts,
            "positions": worker.positions,
            "samples": self.samples,
            "rows": middle["rows"],
            "step_ms": 1e3 * middle["seconds"],
            "cpu_ms": 1e3 * middle["cpu"],
            "phase_ms": {phase: 1e3 * middle[phase] for phase in PHASES},
            "sent_bytes": middle["sent"],
            "state_bytes": state_bytes(worker.optimizer),
            "parameter_bytes": sum(p.nbytes for p in worker.model.parameters()),
            **{key: middle.get(key) for key in PEAKS},
            "hardware": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }


def run(plans: list[Plan], rounds: int, options: argparse.Namespace) -> list[tables.Row]:
    if options.job == "memory":
        rounds = min(rounds, 5)
    for number in range(rounds + 2):
        for plan in plans:
            plan.step(options.job if number >= 2 else None)
    return [plan.row() for plan in plans]


# ---- tables --------------------------------------------------------------------------------------


def summaries(rows: list[tables.Row], options: argparse.Namespace) -> list[tables.Row]:
    """Return, for each number of workers and optimizer, how cost goes with rows and words."""
    many, few = options.words
    found = []
    for workers in options.workers:
        for name in options.optimizers:
            mine = [r for r in rows if (r["workers"], r["optimizer"]) == (workers, name)]

            def of(words: int, drawn_from: int, case: tuple[int, int], mine: Any = mine) -> Any:
                key = ("row-sparse", words, drawn_from, *case)
                names = ("gradients", "words", "drawn_from", "texts", "samples")
                return next(r for r in mine if tuple(r[n] for n in names) == key)

            found.append(
                {
                    "workers": workers,
                    "optimizer": name,
                    "least": of(many, many, CASES[0]),
                    "most": of(many, many, CASES[3]),
                    "same": [
                        (of(many, many, case), of(many, few, case), of(few, few, case))
                        for case in CASES
                    ],
                    "dense": next((r for r in mine if r["gradients"] == "dense"), None),
                }
            )
    return found


def _range(row: tables.Row, ratio: Any) -> str:
    """Return the least and the largest over the cases, to two digits."""
    values = [ratio(*triple) for triple in row["same"]]
    return f"{min(values):.2f} to {max(values):.2f}"


def _growth(row: tables.Row, key: str) -> str:
    return f"{row['most'][key] / row['least'][key]:.1f}"


def _dense(row: tables.Row, key: str) -> str:
    return f"{row['dense'][key] / row['least'][key]:.0f}" if row["dense"] else "-"


COLUMNS: tables.Columns = {
    "workers": lambda row: str(row["workers"]),
    "optimizer": lambda row: row["optimizer"],
    "words (texts of)": lambda row: f"{row['words']:,} ({row['drawn_from']:,})",
    "texts, samples": lambda row: f"{row['texts']}, {row['samples']}",
    "rows": lambda row: (
        f"{row['rows']:,.0f}" if row["gradients"] == "row-sparse" else f"dense: {row['rows']:,.0f}"
    ),
    "step, ms": lambda row: f"{row['step_ms']:.1f}",
    "processor": lambda row: f"{row['cpu_ms']:.1f}",
    ", ".join(PHASES): lambda row: ", ".join(f"{ms:.1f}" for ms in row["phase_ms"].values()),
    "sent": lambda row: f"{row['sent_bytes']:,.0f}",
    "kept, MiB": lambda row: f"{row['state_bytes'] / MEBIBYTE:.0f}",
    "peak, MiB": lambda row: f"{row['peak_bytes'] / MEBIBYTE:.1f}",
    "of exchange and update": lambda row: f"{row['update_peak_bytes'] / MEBIBYTE:.1f}",
}

SUMMARY: tables.Columns = {
    "workers": lambda row: str(row["workers"]),
    "optimizer": lambda row: row["optimizer"],
    "words of text ×": lambda row: _growth(row, "texts"),
    "rows ×": lambda row: _growth(row, "rows"),
    "time ×": lambda row: _growth(row, "cpu_ms"),
    "peak ×": lambda row: _growth(row, "peak_bytes"),
    "exchange and update: peak bytes a row": lambda row: (
        f"{row['most']['update_peak_bytes'] / row['most']['rows']:,.0f}"
    ),
    "sent ×": lambda row: _growth(row, "sent_bytes"),
    "texts of the same words, words × 10: time": lambda row: _range(
        row, lambda many, near, few: near["cpu_ms"] / few["cpu_ms"]
    ),
    "rows farther apart: time": lambda row: _range(
        row, lambda many, near, few: many["cpu_ms"] / near["cpu_ms"]
    ),
    "words × 10: peak": lambda row: _range(
        row, lambda many, near, few: many["peak_bytes"] / few["peak_bytes"]
    ),
    "dense / sparse: time": lambda row: _dense(row, "cpu_ms"),
    "peak": lambda row: _dense(row, "peak_bytes"),
    "sent": lambda row: _dense(row, "sent_bytes"),
}


if __name__ == "__main__":
    main()
