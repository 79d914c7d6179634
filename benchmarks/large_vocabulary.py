"""Does a step with a million words cost what it touches? From lookup to update, on 1 and 2 ranks.

    OMP_NUM_THREADS=1 python benchmarks/large_vocabulary.py \
        --json benchmarks/results/large-vocabulary.json

An LSTM with an embedding and a sampled softmax, each 1,000,000 x 64, with row-sparse gradients, on
real Horovod ranks, which this script starts; half an hour on two busy cores. Texts are words drawn
uniformly, so that nearly every word is another row. Cases and vocabularies take turns, so that what
else the machine does falls on all of them; times are medians.

"processor": time of this rank's main thread, which does not count while another program has the
    core. Ratios are of it.
"rows": of embedding and softmax weight, over all ranks: those that the update of each rank touches.
"kept": the optimizer's state.
"peak": by how much the resident memory of a rank rises within a step, in jobs of their own, with
    all state touched before; "of exchange and update": after backward.
"dense": the same step with sparse=False, made a few times.

A vocabulary of 1,000,000 words is tried with texts of all of them, and with texts of the first
100,000 words only. What the second costs more than a vocabulary of 100,000 is work on whole tables;
what the first costs more than the second is memory that lies farther apart.
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

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.contenders import OURS, state_bytes
from benchmarks.large_vocabulary_tables import CASES, COLUMNS, PHASES, SUMMARY, summaries
from benchmarks.resident import RETURNS_FREED, forget_peak, resident
from dgc import DistributedOptimizer, row_sparse_names
from dgc.comm import Comm, horovod_job
from workloads.language_models import LSTMLanguageModel

OPTIMIZERS = ["Adam, full, ours", "CS-MV", "CS-V", "SM3", "CS-momentum"]
DENSE_ROUNDS = 3
PEAKS = ("peak_bytes", "update_peak_bytes")


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
    """Run a job for times and one for peaks of memory; return the rows of the first with both."""
    rows, peaks = (run_job(num_workers, job) for job in ("time", "memory"))
    for row, peak in zip(rows, peaks, strict=True):
        assert all(row[key] == peak[key] for key in ("optimizer", "words", "drawn_from", "texts"))
        row.update({key: peak[key] for key in PEAKS})
    return rows


def run_job(num_workers: int, job: str) -> list[tables.Row]:
    environment = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    if job == "memory":
        environment |= RETURNS_FREED
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
        cases = [
            Case(workers[num], drawn_from, *sizes)
            for sizes in CASES
            for num, drawn_from in ((many, many), (many, few), (few, few))
        ]
        rows += run(cases, options.rounds, options)
        del workers, cases
        gc.collect()
        if name in options.dense:
            rows += run(
                [Case(Worker(comm, name, many, options, dense=True), many, *CASES[0])],
                DENSE_ROUNDS,
                options,
            )
            gc.collect()
        if comm.rank == 0:
            print(f"{options.job}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows


class Worker:
    """One rank's model and optimizer, with a vocabulary of num_words."""

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
                tensor += 0  # memory that nobody has written does not count as resident
        self.generator = torch.Generator().manual_seed(comm.rank)
        torch.manual_seed(1 + comm.rank)  # seeds the sampled words

    def texts(self, num: int, drawn_from: int) -> torch.Tensor:
        return torch.randint(drawn_from, (self.positions + 1, num), generator=self.generator)


class Case:
    """The steps of one worker in one case, and what is found in them."""

    def __init__(self, worker: Worker, drawn_from: int, texts: int, samples: int) -> None:
        self.worker, self.drawn_from, self.texts, self.samples = worker, drawn_from, texts, samples
        self.found: dict[str, list[float]] = defaultdict(list)

    def step(self, watched: str | None) -> None:
        """Make a step; note its times and, for "memory", its peaks; None: note nothing."""
        model, optimizer = self.worker.model, self.worker.optimizer
        model.softmax.num_samples = self.samples
        texts = self.worker.texts(self.texts, self.drawn_from)
        gc.collect()
        self.worker.comm.barrier()
        if watched == "memory":
            before = resident("VmRSS")
            forget_peak()
        start, cpu = time.perf_counter(), time.thread_time()
        loss = model(texts[:-1], texts[1:])[0]
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        if watched == "memory":
            of_model = resident("VmHWM") - before
            forget_peak()
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


def run(cases: list[Case], rounds: int, options: argparse.Namespace) -> list[tables.Row]:
    if options.job == "memory":
        rounds = min(rounds, 5)
    for number in range(rounds + 2):
        for case in cases:
            case.step(options.job if number >= 2 else None)
    return [case.row() for case in cases]


if __name__ == "__main__":
    main()
