"""Runs that are done only once: kept results, and trainings by train.py under horovodrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import Row
from configs import load
from engine.writing import write_atomically

ROOT = Path(__file__).parents[1]


def use_one_thread() -> None:
    """Set up a process of a pool, beside others on the same cores."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # or a saturated LSTM's tiny gradients take ten times as long


def read_result(path: Path, settings: Row) -> Row | None:
    """Return the finished run that is kept at `path`, None if none is; refuse other settings."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} is of another run, {result['settings']}; name another --out")
    return result


def keep_result(path: Path, result: Row) -> Row:
    """Write the result of a finished run; return it as `read_result` will."""
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return json.loads(text)


def trained(
    files: Sequence[str], settings: Mapping[str, str], num_ranks: int, suffix: str, runs: Path
) -> tuple[Path, Row]:
    """Return the folder and result of a run of train.py, after running it if it is not complete.

    Args: files: config files, below the repository or absolute. settings: dotted path below
        `configs` -> text. runs: the folder of all runs, below the repository or absolute.
    """
    folder = ROOT / runs / load.run_name(files, suffix)
    if not (folder / "result.json").exists():
        words = [word for path, text in settings.items() for word in (f"--configs.{path}", text)]
        command = ["horovodrun", "-np", str(num_ranks), "python", "train.py", "--configs", *files,
                   *words, "--suffix", suffix, "--runs", str(runs)]  # fmt: skip
        print(" ".join(command), file=sys.stderr, flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    asked = load.flatten(load.compose([ROOT / Path(file).expanduser() for file in files], settings))
    if changed := load.changes(result["config"], asked):
        sys.exit(f"{folder} is of another run; name another --runs:\n" + "\n".join(changed))
    return folder, result
