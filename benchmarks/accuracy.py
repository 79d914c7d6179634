"""What sparsity costs in accuracy: train one config at several densities, with several seeds.

    python benchmarks/accuracy.py --configs configs/digits/resnet20.py --densities 1 0.01 0.001 \
        --seeds 1 2 3 -np 2 --json benchmarks/results/digits.json --picture curves.png

Density 1 is the dense all-reduce; the others add configs/dgc/wm5.py. Further settings, such as
`--configs.train.num_epochs 10`, go to train.py; those below `configs.dgc` only to the sparse runs.
Runs that are complete are not run again, so the command can be stopped at any time and repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import runs, tables

METRIC = "acc/test_top1"


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.01, 0.001])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("-np", type=int, default=2, help="ranks")
    parser.add_argument("--runs", type=tables.path, default="runs", help="folder of all runs")
    parser.add_argument("--picture", type=tables.path, help="draw the curves here")
    options, words = parser.parse_known_args()
    settings = settings_in(words)

    rows = []
    for density in options.densities:
        results = [run(options, settings, density, seed) for seed in options.seeds]
        rows.append(summarize(density, results))
        tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(options, rows)


def settings_in(words: list[str]) -> dict[str, str]:
    """Return path -> text of words like `--configs.seed 3` and `--configs.seed=3`."""
    found, rest = {}, iter(words)
    for word in rest:
        path, equals, text = word.partition("=")
        if not path.startswith("--configs."):
            sys.exit(f"{word} is neither an option of this script nor one of --configs.<setting>")
        found[path.removeprefix("--configs.")] = text if equals else next(rest, "")
    return found


def run(
    options: argparse.Namespace, settings: dict[str, str], density: float, seed: int
) -> dict[str, Any]:
    """Return a run's result, after running it if it is not complete."""
    files, settings = list(options.configs), {"seed": str(seed), **settings}
    if density < 1:
        files.append("configs/dgc/wm5.py")
        settings = {"dgc.density": str(density), **settings}
    else:
        settings = {path: text for path, text in settings.items() if not path.startswith("dgc.")}
    suffix = f".density-{density:g}.seed-{seed}"
    folder, result = runs.trained(files, settings, options.np, suffix, options.runs)
    return result | {"folder": folder.name}


def summarize(density: float, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: means over seeds, and each seed's own accuracy."""
    last = [result["metrics"][METRIC]["last"] for result in results]
    first = results[0]
    return {
        "density": density,
        "accuracy": statistics.mean(last),
        "accuracies": last,
        "train_loss": statistics.mean(r["metrics"]["loss/train"]["last"] for r in results),
        "payload_bytes_per_step": statistics.mean(r["payload_bytes_per_step"] for r in results),
        "dense_bytes_per_step": first["dense_bytes_per_step"],
        "seconds_per_step": statistics.mean(r["seconds_per_step"]["total"] for r in results),
        "state_bytes_per_parameter": sum(
            first["state_bytes"][kind]
            for kind in ("gradients", "residual", "velocity", "optimizer")
        )
        / first["num_parameters"],
        "steps": first["steps"],
        "world_size": first["world_size"],
        "versions": first["versions"],
        "hardware": first["hardware"],
        "folders": [result["folder"] for result in results],
    }


COLUMNS: tables.Columns = {
    "density": lambda row: f"{row['density']:g}",
    "test accuracy, last epoch (each seed)": lambda row: (
        f"{row['accuracy']:.2f} ({', '.join(f'{value:.2f}' for value in row['accuracies'])})"
    ),
    "train loss": lambda row: f"{row['train_loss']:.3f}",
    "sent a step, mean": lambda row: f"{row['payload_bytes_per_step']:,.0f}",
    "dense / sent": lambda row: (
        f"{row['dense_bytes_per_step'] / row['payload_bytes_per_step']:.1f}"
    ),
    "state bytes a parameter": lambda row: f"{row['state_bytes_per_parameter']:.2f}",
    "s a step": lambda row: f"{row['seconds_per_step']:.3f}",
}


def draw(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Draw test accuracy over examples: a line for each run, a colour for each density."""
    figure, axes = tables.new_picture()
    for color, row in enumerate(rows):
        for number, folder in enumerate(row["folders"]):
            scalars = tables.read_scalars(runs.ROOT / options.runs / folder)
            points = sorted(dict(scalars[METRIC]).items())
            label = "dense" if row["density"] == 1 else f"density {row['density']:g}"
            axes.plot(*zip(*points, strict=True), color=f"C{color}",
                      label=None if number else label)  # fmt: skip
    axes.set(xlabel="examples", ylabel="test accuracy (%)", title=" ".join(options.configs))
    axes.grid(alpha=0.3)
    axes.legend()
    tables.save_picture(figure, options.picture)


if __name__ == "__main__":
    main()
