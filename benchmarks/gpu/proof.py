"""Run the stages of the proof, each in a process of its own with a time limit, and sum them up.

    launch/gpu_proof.sh OUT [--stages 1,2,3,4,5] [--rehearse]

Leaves in OUT, after each stage: table.md, figures.jsonl (a line for each figure, as it was found),
log.txt, and what single stages draw. A stage that fails, hangs or is killed does not stop others.
Stage 4 is two: ranks under torchrun (4t), and under Horovod (4h), which is skipped where Horovod's
source is not among the wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.common import SKIPPED, met

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    module: str
    title: str
    seconds: int  # its limit; twice that in a rehearsal, on few cores


STAGES = {
    "1": Stage("right", "against the specification; compute-sanitizer", 170),
    "2": Stage("speed", "speed, launches and waits", 150),
    "3": Stage("workers", "four workers in one process", 90),
    "4t": Stage("ranks", "two ranks share the GPU, killed and resumed: torchrun", 120),
    "4h": Stage("horovod", "the same with Horovod, built there", 420),
    "5": Stage("large", "BERT-Large's shapes", 150),
}
SEVERAL = {"4": ["4t", "4h"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default=",".join(map(str, STAGES)))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    wanted = [name for word in options.stages.split(",") for name in SEVERAL.get(word, [word])]
    if unknown := set(wanted) - STAGES.keys():
        parser.error(f"--stages {unknown}; allowed: {sorted({*STAGES, *SEVERAL})}")
    for name in ("figures.jsonl", "log.txt", "table.md", "horovod-build.log"):
        (options.out / name).unlink(missing_ok=True)
    where = machine(options.rehearse)
    results: dict[str, tuple[str, float]] = {}
    for name in STAGES:
        if name in wanted:
            results[name] = run(name, options)
        table = summed_up(where, results, wanted, options)
        (options.out / "table.md").write_text(table)
    print(table)
    sys.exit(any(not status.startswith(("passed", "skipped")) for status, _ in results.values()))


def run(name: str, options: argparse.Namespace) -> tuple[str, float]:
    """Run a stage; return how it ended and its seconds."""
    stage, start = STAGES[name], time.monotonic()
    limit = stage.seconds * (2 if options.rehearse else 1)
    words = [sys.executable, "-m", f"benchmarks.gpu.{stage.module}", str(options.out)]
    words += ["--rehearse"] if options.rehearse else []
    print(f"\n== stage {name}: {stage.title}", flush=True)
    with (options.out / "log.txt").open("a") as log:
        print(f"\n== stage {name}: {stage.title}", file=log, flush=True)
        process = subprocess.Popen(
            words, cwd=ROOT, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(limit)
            end = {0: "passed", SKIPPED: "skipped"}.get(status, f"failed, status {status}")
        except subprocess.TimeoutExpired:
            end = f"timed out after {limit} s"
        finally:  # also what it started and left
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    text = (options.out / "log.txt").read_text().rpartition("\n== stage")[2]
    print("\n".join(text.splitlines()[1:][-25:]), flush=True)
    if end == "skipped":
        end += ": " + text.strip().splitlines()[-1].removeprefix("skipped: ")
    return end, time.monotonic() - start


def machine(is_rehearsal: bool) -> str:
    """Say what this runs on."""
    if is_rehearsal or not torch.cuda.is_available():
        card = "no GPU: a rehearsal, whose figures say nothing" if is_rehearsal else "no GPU"
    else:
        found = torch.cuda.get_device_properties(0)
        card = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return f"{card}; {versions}; {os.cpu_count()} cores; commit {commit or 'unknown'}"


def summed_up(
    where: str,
    results: dict[str, tuple[str, float]],
    wanted: list[str],
    options: argparse.Namespace,
) -> str:
    """Return the page with all that was found."""
    file = options.out / "figures.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = ["# The proof on a GPU", "", where, "", "| stage | | ended | s |", "| --- " * 4 + "|"]
    for name, stage in STAGES.items():
        default = "not yet run" if name in wanted else "not asked for"
        end, seconds = results.get(name, (default, 0.0))
        lines.append(f"| {name} | {stage.title} | {end} | {seconds:.0f} |")
    lines += ["", "| goal | found | |", "| --- " * 3 + "|"]
    lines += [f"| {row['goal'][0]} | {row['what']}: {row['text']} | {verdict(row)} |"
              for row in rows if row["goal"]]  # fmt: skip
    lines += ["", "| stage | figure | |", "| --- " * 3 + "|"]
    lines += [f"| {row['stage']} | {row['what']} | {row['text']} |" for row in rows]
    return "\n".join(lines) + "\n"


def verdict(row: dict[str, Any]) -> str:
    return met(row["goal"][1])


if __name__ == "__main__":
    main()
