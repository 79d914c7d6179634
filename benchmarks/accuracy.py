"""What sparsity costs in accuracy: trains one config at several densities and seeds, side by side.

    python benchmarks/accuracy.py --configs configs/digits/resnet20.py --densities 1 0.01 0.001 \
        --seeds 1 2 3 -np 2 --json benchmarks/results/digits.json --picture curves.png

Density 1 is the dense all-reduce; the others add configs/dgc/wm5.py. Further words, such as
`--configs.train.num_epochs 10`, go to train.py; those below `configs.dgc` only to the sparse runs.
Runs that are complete are not run again, so the command can be repeated, and stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from configs import load

ROOT = Path(__file__).parents[1]
METRIC = "acc/test_top1"


def main() -> None:
    parser = tables.parser(__doc__)
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.01, 0.001])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("-np", type=int, default=2, help="ranks")
    parser.add_argument("--runs", type=tables.path, default="runs", help="of all runs")
    parser.add_argument("--picture", type=tables.path, help="draw the curves here")
    options, extra = parser.parse_known_args()

    rows = []
    for density in options.densities:
        results = [run(options, extra, density, seed) for seed in options.seeds]
        rows.append(summarize(density, results))
        tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(options, rows)


def run(options: argparse.Namespace, extra: list[str], density: float, seed: int) -> dict[str, Any]:
    """Return a run's result, after running it if it is not complete."""
    files, words = list(options.configs), ["--configs.seed", str(seed), *extra]
    if density < 1:
        files.append("configs/dgc/wm5.py")
        words = ["--configs.dgc.density", str(density), *words]
    else:
        words = without_dgc(words)
    suffix = f".density-{density:g}.seed-{seed}"
    folder = ROOT / options.runs / load.run_name(files, options.np, suffix)
    if not (folder / "result.json").exists():
        command = ["horovodrun", "-np", str(options.np), "python", "train.py", "--configs", *files,
                   *words, "--suffix", suffix, "--runs", str(options.runs)]  # fmt: skip
        print(" ".join(command), file=sys.stderr, flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "result.json").read_text())
    overrides = dict(
        zip((w.removeprefix("--configs.") for w in words[::2]), words[1::2], strict=True)
    )
    asked = load.flatten(load.compose([ROOT / tables.path(file) for file in files], overrides))
    if changed := load.changes(result["config"], asked):
        sys.exit(f"{folder} is of another run; name another --runs:\n" + "\n".join(changed))
    return result | {"folder": folder.name}


def without_dgc(words: list[str]) -> list[str]:
    kept, rest = [], iter(words)
    for word in rest:
        if word.startswith("--configs.dgc."):
            if "=" not in word:
                next(rest)
        else:
            kept.append(word)
    return kept


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
    """Draw test accuracy over examples, a line a run, a colour a density."""
    figure, axes = tables.new_picture()
    for color, row in enumerate(rows):
        for number, folder in enumerate(row["folders"]):
            points = sorted(dict(tables.read_scalars(ROOT / options.runs / folder)[METRIC]).items())
            label = "dense" if row["density"] == 1 else f"density {row['density']:g}"
            axes.plot(*zip(*points, strict=True), color=f"C{color}",
                      label=None if number else label)  # fmt: skip
    axes.set(xlabel="examples", ylabel="test accuracy (%)", title=" ".join(options.configs))
    axes.grid(alpha=0.3)
    axes.legend()
    tables.save_picture(figure, options.picture)


if __name__ == "__main__":
    main()
