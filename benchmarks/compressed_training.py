"""What sending 0.1% and keeping a byte or two costs in quality: every method, on three tasks.

    OMP_NUM_THREADS=1 python benchmarks/compressed_training.py --task words --data ../shared/data \
        --densities 0.001 --jobs 2 --json benchmarks/results/words.json \
        --picture benchmarks/results/words.png

N workers are simulated in one process by the code that real ranks run (dgc.comm.local). Each
method's rate is the best of its grid at the end of the first seed's run, by validation text or test
images; further seeds repeat that rate. Runs that are in --out already are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.compressed_methods import ALL, METHODS
from benchmarks.simulated import TASKS, Task, is_better, make_task, rate_factor
from dgc import DistributedOptimizer
from dgc.comm.local import LocalComm, run_local
from engine.checkpoint import write_atomically

NUM_EPOCHS = 25  # into which the steps are divided for the density warm-up: 5 are a fifth
NUM_CHECKS = 8


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    results = finished(options) if options.report else run_all(options)
    found = {(r["settings"]["method"], r["settings"]["density"]) for r in results}
    rows = [summarize(key, options.seeds[0], results) for key in variants(options) if key in found]
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(rows, options.picture)


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every rate with the first seed, then the best rate with the others."""
    first, *more = options.seeds
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, use_one_thread) as pool:

        def run(plan: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return pool.starmap(run_once, [(s, options.data, options.out) for s in plan], 1)

        results = run(
            [
                settings_of(options, *key, lr, first)
                for key in variants(options)
                for lr in options.rates or ALL[key[0]].grid(options.task)
            ]
        )
        best = {key: best_rate(key, first, results) for key in variants(options)}
        return results + run(
            [settings_of(options, *key, best[key], seed) for key in best for seed in more]
        )


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs in --out that are of this task, its workers, steps and seeds."""
    results = [json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]
    wanted = {"task": options.task, "workers": options.workers, "steps": options.steps}
    return [
        r
        for r in results
        if wanted.items() <= r["settings"].items() and r["settings"]["seed"] in options.seeds
    ]


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=tables.path, default=Path("data"),
                        help="folder with wikitext-2/ and cifar10/")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.001])
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each method's own grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--out", type=tables.path, default=Path("/tmp/compressed_runs"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread a worker")
    parser.add_argument("--report", action="store_true",
                        help="tell of the runs that are in --out, and run none")  # fmt: skip
    parser.add_argument("--picture", type=tables.path, help="draw the curves here")
    return parser.parse_args()


def use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the tiny gradients of a saturated LSTM take ten times as long


def variants(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Return (method, density): dense methods once, the others at each density."""
    return [
        (method, density)
        for method in options.methods
        for density in ([1.0] if ALL[method].sent is None else options.densities)
    ]


def settings_of(
    options: argparse.Namespace, method: str, density: float, lr: float, seed: int
) -> dict[str, Any]:
    return {"task": options.task, "method": method, "density": density, "lr": lr, "seed": seed,
            "workers": options.workers, "steps": options.steps}  # fmt: skip


def run_once(settings: dict[str, Any], data: Path, out: Path) -> dict[str, Any]:
    """Return a run's result, after running it if it is not there."""
    name = ".".join(f"{value}" for value in settings.values() if value is not None)
    path = out / re.sub(r"[^\w.-]+", "-", f"{name}.json")
    result = tables.read_result(path, settings)
    if result is None:
        task = make_task(settings["task"], data, settings["steps"])
        torch.manual_seed(settings["seed"])
        models = [task.make_model()]
        models += [task.make_model() for _ in range(settings["workers"] - 1)]
        result = run_local(
            settings["workers"], lambda comm: train(comm, settings, task, models[comm.rank])
        )[0]
        text = json.dumps({"settings": settings, **result}, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
        print(f"{path.name}: {result['quality']:.3f} in {result['seconds']:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        result = json.loads(text)
    return result


def train(
    comm: LocalComm, settings: dict[str, Any], task: Task, model: nn.Module
) -> dict[str, Any]:
    """Train one worker's replica; return what the run came to."""
    method, lr, num_steps = ALL[settings["method"]], settings["lr"], task.num_steps
    optimizer = DistributedOptimizer(
        method.optimizer(model, lr),
        model.named_parameters(),
        comm=comm,
        compression=method.compression(settings["density"], task.clip_norm),
        seed=settings["seed"],
    )
    curve, payload, skipped, epoch, seconds = [], 0, 0, -1, 0.0
    batches = task.batches(comm.rank, comm.world_size, settings["seed"])
    for step, backward in zip(range(num_steps), batches, strict=False):
        if step * NUM_EPOCHS // num_steps != epoch:
            epoch = step * NUM_EPOCHS // num_steps
            optimizer.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, num_steps)
        start = time.perf_counter()
        loss = backward(model)
        if method.sent is None and task.clip_norm:
            optimizer.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
        optimizer.step()
        kept = state_bytes(optimizer, model)
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        payload, skipped = optimizer.stats.payload_bytes, skipped + bool(optimizer.stats.skipped)
        if not math.isfinite(comm.all_gather_object(loss)[0]):
            break
        if (step + 1) * NUM_CHECKS // num_steps != step * NUM_CHECKS // num_steps:
            average_buffers(model, comm)
            if comm.rank == 0:
                curve.append((step + 1, task.evaluate(model, is_final=False)))
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert all(torch.equal(vector, other) for other in comm.all_gather_object(vector))
    quality = task.evaluate(model, is_final=True) if comm.rank == 0 else math.nan
    return {
        "quality": quality,
        "quality_name": task.quality,
        "validation": curve[-1][1] if curve else math.nan,
        "curve": curve,
        "payload_bytes": payload,
        "skipped_steps": skipped,
        "seconds": seconds,
        "steps": num_steps,
        "state_bytes": kept,
        "num_parameters": vector.numel(),
    }


def average_buffers(model: nn.Module, comm: LocalComm) -> None:
    for number, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            comm.all_reduce_async(buffer, f"buffer{number}").wait()
            buffer /= comm.world_size


def state_bytes(optimizer: DistributedOptimizer, model: nn.Module) -> dict[str, int]:
    """Return what lives beside the parameters when a step is over, by kind, from the tensors."""
    state = [t for s in optimizer.inner.state.values() for t in s.values() if torch.is_tensor(t)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "gradients": sum(g.nbytes for g in gradients),
        **optimizer.worker_state_bytes(),
        "optimizer": sum(t.nbytes for t in state),
    }


def best_rate(key: tuple[str, float], seed: int, results: list[dict[str, Any]]) -> float:
    best = None
    for result in runs_of(key, results):
        is_words = result["quality_name"] == "perplexity"
        score = "validation" if is_words else "quality"  # images have no third set
        if result["settings"]["seed"] == seed and (
            best is None or is_better(result["quality_name"], result[score], best[score])
        ):
            best = result
    return best["settings"]["lr"]


def runs_of(key: tuple[str, float], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if (r["settings"]["method"], r["settings"]["density"]) == key]


def summarize(key: tuple[str, float], seed: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: the mean over seeds at the best rate, and what was measured of it."""
    lr = best_rate(key, seed, results)
    every = sorted(runs_of(key, results), key=lambda r: r["settings"]["seed"])
    runs = [r for r in every if r["settings"]["lr"] == lr]
    first = runs[0]
    return {
        "method": key[0],
        "density": key[1],
        "quality": statistics.mean(r["quality"] for r in runs),
        "qualities": [r["quality"] for r in runs],
        "quality_name": first["quality_name"],
        "lr": lr,
        "quality_of_rate": {
            r["settings"]["lr"]: r["quality"] for r in every if r["settings"]["seed"] == seed
        },
        "state_bytes": first["state_bytes"],
        "payload_bytes": first["payload_bytes"],
        "num_parameters": first["num_parameters"],
        "seconds_per_step": statistics.median(r["seconds"] / r["steps"] for r in runs),
        "skipped_steps": sum(r["skipped_steps"] for r in runs),
        "steps": first["steps"],
        "settings": first["settings"],
        "curve": first["curve"],
    }


def per_parameter(row: dict[str, Any]) -> float:
    return sum(row["state_bytes"].values()) / row["num_parameters"]


COLUMNS: tables.Columns = {
    "method": lambda row: row["method"],
    "density": lambda row: f"{row['density']:g}",
    "quality": lambda row: f"{row['quality']:.2f}",
    "each seed": lambda row: ", ".join(f"{q:.2f}" for q in row["qualities"]),
    "rate (others)": lambda row: (
        f"{row['lr']:g} ("
        + ", ".join(
            f"{lr:g}: {q:.2f}" for lr, q in row["quality_of_rate"].items() if lr != row["lr"]
        )
        + ")"
    ),
    "bytes a parameter": lambda row: f"{per_parameter(row):.2f}",
    "of them gradient, residual, velocity, statistics, optimizer": lambda row: ", ".join(
        f"{row['state_bytes'][kind] / row['num_parameters']:.2f}"
        for kind in ("gradients", "residual", "velocity", "statistics", "optimizer")
    ),
    "dense / sent, last step": lambda row: (
        f"{4 * row['num_parameters'] / row['payload_bytes']:.0f}"
    ),
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the validation over steps, a line a row."""
    from matplotlib import colormaps

    figure, axes = tables.new_picture()
    for number, row in enumerate(rows):
        color, style = colormaps["tab10"](number % 10), ("-", "--", ":")[number // 10]
        label = row["method"] + (f", {row['density']:g}" if row["density"] < 1 else "")
        axes.plot(*zip(*row["curve"], strict=True), style, color=color, label=label)
    last = [row["curve"][-1][1] for row in rows]
    is_accuracy = rows[0]["quality_name"] == "accuracy"
    limits = (min(last) - 15, 100) if is_accuracy else (0.95 * min(last), 3 * min(last))
    axes.set(xlabel="step", ylabel=f"{rows[0]['quality_name']}, validation", ylim=limits)
    axes.legend(fontsize=6)
    tables.save_picture(figure, path)


if __name__ == "__main__":
    main()
