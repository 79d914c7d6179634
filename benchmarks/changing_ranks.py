"""What it does to quality when a run goes on with other numbers of ranks: 4, then 2, 3 and 4.

    python benchmarks/changing_ranks.py --seeds 1 2 3 -- --configs configs/digits/resnet20.py ...

For each seed: an undisturbed run of four ranks, and one that is stopped by SIGUSR1 three times, a
quarter of its steps after another, and goes on with the next number of ranks. What ranks have not
sent, statistics and the epoch's samples go over to the others; rate and samples a step follow the
number of ranks. Prints the last epoch's figures.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch.output import newest_step

ROOT = Path(__file__).parents[1]
LEGS = (4, 2, 3, 4)
PATIENCE_S = 1800


def start(num_ranks: int, words: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            ["launch/train.sh", "-np", str(num_ranks), *words],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip


def num_saved(runs: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((0, *map(newest_step, runs.glob("*"))))


def train(legs: tuple[int, ...], words: list[str], runs: Path, num_steps: int) -> dict[str, float]:
    """Train with these numbers of ranks in turn; return the last epoch's figures.

    num_steps: that one rank would take alone. Each leg does an equal part of them.
    """
    log, begun, goal = runs.parent / f"{runs.name}.log", time.monotonic(), 0.0
    for number, num_ranks in enumerate(legs):
        process, is_last = start(num_ranks, words, log), number == len(legs) - 1
        goal += num_steps / len(legs) / num_ranks
        while process.poll() is None and (is_last or num_saved(runs) < goal):
            if time.monotonic() - begun > PATIENCE_S:
                process.kill()
                raise RuntimeError(f"not done after {PATIENCE_S} s: {log}")
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
        if process.wait():
            raise RuntimeError(f"{num_ranks} ranks failed:\n{log.read_text()[-3000:]}")
    (result,) = runs.glob("*/result.json")
    metrics = json.loads(result.read_text())["metrics"]
    return {key: metrics[key]["last"] for key in ("loss/train", "loss/test", "acc/test_top1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps-per-epoch", type=int, default=45, help="of one rank")
    parser.add_argument("words", nargs="+", help="for train.py, after --")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="parsimony-ranks-") as folder:
        for seed in arguments.seeds:
            changed = {"train.num_epochs": arguments.epochs, "seed": seed}
            changed["checkpoint.every_steps"] = 5
            words = list(arguments.words)
            for key, value in changed.items():
                words += [f"--configs.{key}", str(value)]
            for name, legs in (("4 ranks", (4,)), ("4, 2, 3, 4", LEGS)):
                runs = Path(folder) / f"{seed}-{len(legs)}"
                num_steps = arguments.epochs * arguments.steps_per_epoch
                figures = train(legs, [*words, "--runs", str(runs)], runs, num_steps)
                rows.setdefault(name, []).append(figures)
                print(f"seed {seed}, {name}: {figures}", flush=True)
    for name, figures in rows.items():
        for key in figures[0]:
            values = [each[key] for each in figures]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"| {name} | {key} | {statistics.fmean(values):.4f} +- {spread:.4f} |")


if __name__ == "__main__":
    main()
