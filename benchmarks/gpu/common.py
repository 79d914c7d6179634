"""What the proof's stages share: where they run, the figures they leave, what a step launches."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parsimony_kernels.runtime import choice, launch

SKIPPED = 77  # the exit status of a stage that cannot run here
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
WAITS += ("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize")


@dataclass(frozen=True)
class Proof:
    """One stage under way. stage: its name. out: the folder of results."""

    stage: str
    out: Path
    is_rehearsal: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_rehearsal else "cuda")

    def size(self, real: Any, rehearsed: Any) -> Any:
        return rehearsed if self.is_rehearsal else real

    def add(
        self, what: str, text: str, goal: tuple[str, bool] | None = None, **values: Any
    ) -> None:
        """Keep a figure at once, so that it outlives the stage.

        Args: text: for the table. goal: what is asked, and whether it is met.
        """
        row = {"stage": self.stage, "what": what, "text": text, "goal": goal, **values}
        with (self.out / "figures.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{what}: {text}" + (f" [{goal[0]}: {met(goal[1])}]" if goal else ""), flush=True)


def met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def begin(stage: str, description: str | None) -> Proof:
    """Return the stage that the command line asks for; skip it where there is no GPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("skipped: torch sees no GPU")
        sys.exit(SKIPPED)
    return Proof(stage, options.out, options.rehearse)


@contextlib.contextmanager
def emulated() -> Iterator[Any]:
    """Run the CUDA source on the CPU; yields the emulator, which counts launches.

    It runs one kernel at a time: those of workers in several threads wait for each other.
    """
    from tests.emulation.emulator import Emulator

    class OneAtATime(Emulator):
        lock = threading.Lock()

        def launch(self, *arguments: Any) -> None:
            with self.lock:
                super().launch(*arguments)

    before = launch.launcher, choice._module
    launch.launcher = OneAtATime()
    choice._module = lambda chosen, folder, device_type: importlib.import_module(
        f"parsimony_kernels.{folder}.{'device' if chosen == 'native' else chosen}"
    )
    try:
        yield launch.launcher
    finally:
        launch.launcher, choice._module = before


def counted(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the kernels that `work` launches on a GPU, copies, and times that the host waits.

    On a CPU it is called under the emulator, which knows its kernels and nothing of torch's.
    """
    if device.type == "cpu":
        before = Counter(launch.launcher.launches)
        work()
        kernels = Counter(launch.launcher.launches) - before
        return {"launches": kernels.total(), "kernels": dict(kernels), "copies": {}, "waits": 0}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    return counts(profiler)


def counts(profiler: Any) -> dict[str, Any]:
    """Sum up a trace. The profiler's own wait at its end is left out."""
    kernels, copies, waits = Counter(), Counter(), Counter()
    busy = 0.0
    for event in profiler.events():
        name = event.name
        if getattr(event, "is_user_annotation", False) or name.startswith("Optimizer."):
            continue  # the host's ranges, as the device sees them
        if event.device_type == torch.autograd.DeviceType.CUDA:
            is_copy = name.startswith(("Memcpy", "Memset"))
            (copies if is_copy else kernels)[name[:80]] += 1
            busy += event.time_range.elapsed_us()
        elif name in WAITS:
            waits[name] += 1
    waits["cudaDeviceSynchronize"] -= min(1, waits["cudaDeviceSynchronize"])
    return {
        "launches": kernels.total(), "kernels": dict(kernels), "copies": dict(copies),
        "waits": waits.total(), "waits_by_name": dict(+waits), "busy_ms": busy / 1e3,
    }  # fmt: skip


def summary(found: dict[str, Any]) -> str:
    return (f"{found['launches']} launches, {sum(found['copies'].values())} copies, "
            f"{found['waits']} waits")  # fmt: skip
