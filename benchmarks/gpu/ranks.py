"""Stage 4t: two ranks, processes of their own, share the GPU; train.py, killed, resumes to the bit.

Under torchrun; a GPU's tensors travel through the host's memory. Each method trains twice on
scikit-learn's digits: undisturbed, and with one rank killed by SIGKILL in the middle, after which
the same command goes on. Parameters must be the same to the bit; those of the two ranks train.py
itself compares after each epoch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from traceback import extract_tb
from typing import Any

import pytest
import torch

from benchmarks.gpu.common import Proof, begin
from parsimony_kernels.runtime import launch
from tests.integration.conftest import DIGITS, SPARSE, Runs
from tests.integration.test_failures import kill_a_rank

METHODS = {
    "recommended": [*DIGITS, "configs/optim/parsimony.py"],
    "DGC-SGD": SPARSE,
}
PERCEPTRON = "tests/integration/perceptron.py"  # instead of ResNet-20, in a rehearsal


def main() -> None:
    prove(begin("4t", __doc__), "torchrun")


def prove(proof: Proof, launcher: str) -> None:
    """Train by each method, at once where there are the cores for it; exit with 1 if one differs.

    launcher: see tests/jobs.py.
    """
    if not proof.is_rehearsal:
        torch.cuda.init()
        launch._module(0)  # compiled once, and not by all ranks at the same time
    names = list(METHODS)[: proof.size(2, 1)]
    with ThreadPoolExecutor(len(names)) as pool:
        is_right = list(pool.map(lambda name: same_to_the_bit(proof, launcher, name), names))
    sys.exit(not all(is_right))


def same_to_the_bit(proof: Proof, launcher: str, name: str) -> bool:
    """Run undisturbed and killed; tell whether both ended alike, and on the device asked for."""
    what, start = f"{launcher}, {name}", time.monotonic()
    configs = [*METHODS[name], *proof.size([], [PERCEPTRON])]
    with tempfile.TemporaryDirectory() as folder:
        try:
            one = Runs(Path(folder)).straight_and_killed(
                "--devices", proof.size("gpu", "cpu"), step=proof.size(14, 6), kill=kill_a_rank,
                launcher=launcher, configs=configs, **settings(proof),
            )  # fmt: skip
        except (AssertionError, pytest.fail.Exception) as failure:
            asked, printed = extract_tb(failure.__traceback__)[-1].line, str(failure)[-4000:]
            print(f"{what}:\n{printed}", flush=True)
            proof.add(what, f"failed: {asked}", ("resumes to the bit", False), log=printed)
            return False
    is_there = one["hardware"]["device"] == proof.device.type and one["world_size"] == 2
    proof.add(what, told(one, time.monotonic() - start), ("resumes to the bit", is_there), **one)
    return is_there


def settings(proof: Proof) -> dict[str, Any]:
    """Return overrides for both methods, with __ for the dot: 64 steps, 16 in a rehearsal."""
    return {"checkpoint__every_steps": 2, "train__num_epochs": proof.size(8, 2),
            "train__lr_warmup_epochs": 1, "data__samples_per_epoch": 512,
            "dgc__density": 0.01, "dgc__density_warmup_epochs": 1}  # fmt: skip


def told(one: dict[str, Any], seconds: float) -> str:
    return (
        f"two ranks on {one['hardware'].get('gpu', 'the CPU')}, one of them killed: "
        f"{one['steps']} steps, parameters {one['parameter_hash'][:12]} both times, "
        f"{1e3 * one['seconds_per_step']['total']:.0f} ms a step, "
        f"{one['metrics']['acc/test_top1']['last']:.1f}% right; {seconds:.0f} s in all"
    )


if __name__ == "__main__":
    main()
