"""What sparse exchange and small state cost in quality: every method, on three kinds of task.

    OMP_NUM_THREADS=1 python benchmarks/compressed_training.py --task words --data ../shared/data \
        --densities 0.001 --jobs 2 --json benchmarks/results/words.json \
        --picture benchmarks/results/words.png

N workers are simulated in one process by the code that real ranks run (dgc.comm.local). Each method
is run with the first seed at every rate of its grid; the rate that ends best, on validation text or
test images, is then run with the other seeds. Runs that are in --out already are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import runs, tables
from benchmarks.compressed_methods import ALL, METHODS
from benchmarks.compressed_worker import Worker
from benchmarks.simulated import TASKS, is_better, make_task
from dgc.comm.local import run_local


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
    with context.Pool(options.jobs, runs.use_one_thread) as pool:

        def run(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return pool.starmap(run_once, [(s, options.data, options.out) for s in settings], 1)

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
    """Return the runs in --out of this task, with these workers, steps and seeds."""
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
    result = runs.read_result(path, settings)
    if result is None:
        task = make_task(settings["task"], data, settings["steps"])
        torch.manual_seed(settings["seed"])
        models = [task.make_model() for _ in range(settings["workers"])]
        result = run_local(
            settings["workers"], lambda comm: Worker(comm, settings, task, models[comm.rank]).run()
        )[0]
        print(f"{path.name}: {result['quality']:.3f} in {result['seconds']:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        result = runs.keep_result(path, {"settings": settings, **result})
    return result


def best_rate(key: tuple[str, float], seed: int, results: list[dict[str, Any]]) -> float:
    best = None
    for result in runs_of(key, results):
        is_words = result["quality_name"] == "perplexity"
        score = "validation" if is_words else "quality"  # images have no validation set
        if result["settings"]["seed"] == seed and (
            best is None or is_better(result["quality_name"], result[score], best[score])
        ):
            best = result
    return best["settings"]["lr"]


def runs_of(key: tuple[str, float], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if (r["settings"]["method"], r["settings"]["density"]) == key]


def summarize(key: tuple[str, float], seed: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: means over seeds at the best rate."""
    lr = best_rate(key, seed, results)
    every = sorted(runs_of(key, results), key=lambda r: r["settings"]["seed"])
    best = [r for r in every if r["settings"]["lr"] == lr]
    first = best[0]
    return {
        "method": key[0],
        "density": key[1],
        "quality": statistics.mean(r["quality"] for r in best),
        "qualities": [r["quality"] for r in best],
        "quality_name": first["quality_name"],
        "lr": lr,
        "quality_of_rate": {
            r["settings"]["lr"]: r["quality"] for r in every if r["settings"]["seed"] == seed
        },
        "state_bytes": first["state_bytes"],
        "payload_bytes": first["payload_bytes"],
        "num_parameters": first["num_parameters"],
        "seconds_per_step": statistics.median(r["seconds"] / r["steps"] for r in best),
        "skipped_steps": sum(r["skipped_steps"] for r in best),
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
    """Draw the quality on validation data over steps: a line for each row."""
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
