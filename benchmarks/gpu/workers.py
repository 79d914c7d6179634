"""Stage 3: four workers in one process train on the GPU as on the CPU; a timeline of their steps.

Parameters of the workers must be equal to the bit, and the GPU's equal to the CPU's within
rounding. Leaves timeline.json.gz (for chrome://tracing or Perfetto) and timeline.png: what is
computed for backward and what for the exchange.
"""

from __future__ import annotations

import copy
import gzip
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import tables
from benchmarks.gpu.common import Proof, begin, counts, summary
from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from memory.job import RECOMMENDED, factored_adam

NUM_WORKERS, NUM_TRACED = 4, 2
MOST_APART = 0.02  # of the whole way that training went
METHODS = {
    "recommended": (factored_adam, RECOMMENDED),
    "DGC-SGD": (lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9), Compression()),
}


def main() -> None:
    proof = begin("3", __doc__)
    width, num_steps = proof.size((1024, 12), (64, 4))
    initial, is_right = model_of(width), True  # made here: workers share torch's random state
    for name in METHODS:
        there = train(proof.device, name, initial, num_steps)
        here = train(torch.device("cpu"), name, initial, num_steps)
        is_right &= compare(proof, name, there, here, flat(initial))
    trace(proof, initial)
    sys.exit(not is_right)


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


class Worker:
    """One worker's model, optimizer and data."""

    def __init__(self, comm: Any, device: torch.device, name: str, initial: nn.Module) -> None:
        make, compression = METHODS[name]
        self.model, self.device = copy.deepcopy(initial).to(device), device
        self.optimizer = DistributedOptimizer(
            make(self.model.parameters()), self.model.named_parameters(), comm=comm,
            compression=compression, bucket_bytes=8 * initial[0].weight.numel(),
        )  # fmt: skip
        self.optimizer.set_density(0.01)
        self.generator = torch.Generator().manual_seed(comm.rank)
        self.width = initial[0].in_features

    def step(self) -> float:
        inputs = torch.randn(32, self.width, generator=self.generator)
        targets = inputs[:, :10].argmax(1).to(self.device)
        with record_function("forward"):
            loss = nn.functional.cross_entropy(self.model(inputs.to(self.device)), targets)
        with record_function("backward"):
            loss.backward()
        with record_function("exchange"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def train(device: torch.device, name: str, initial: nn.Module, num_steps: int) -> list[Any]:
    """Return each worker's losses and parameters."""

    def work(comm: Any) -> tuple[list[float], torch.Tensor]:
        worker = Worker(comm, device, name, initial)
        losses = [worker.step() for _ in range(num_steps)]
        return losses, flat(worker.model)

    return run_local(NUM_WORKERS, work)


def compare(proof: Proof, name: str, there: Any, here: Any, first: torch.Tensor) -> bool:
    is_same = all(torch.equal(there[0][1], parameters) for _, parameters in there[1:])
    proof.add(f"{name}, replicas", "equal to the bit" if is_same else "differ",
              ("replicas equal to the bit", is_same))  # fmt: skip
    apart = ((there[0][1] - here[0][1]).norm() / (here[0][1] - first).norm()).item()
    losses = [max(abs(a - b) / abs(b) for a, b in zip(mine[0], theirs[0], strict=True))
              for mine, theirs in zip(there, here, strict=True)]  # fmt: skip
    # Not the parameters: a sum that is rounded otherwise decides which of two entries leaves.
    is_close = max(losses) <= MOST_APART
    text = f"parameters {apart:.1e} of the way apart, losses {max(losses):.1e}"
    proof.add(f"{name}, GPU and CPU", text, ("losses equal within rounding", is_close),
              losses=there[0][0])  # fmt: skip
    return is_same and is_close


# ---- the timeline --------------------------------------------------------------------------------


def trace(proof: Proof, initial: nn.Module) -> None:
    """Profile two steps of all workers, after some that are not."""
    activities = [ProfilerActivity.CPU]
    activities += [] if proof.is_rehearsal else [ProfilerActivity.CUDA]

    def work(comm: Any) -> Any:
        worker = Worker(comm, proof.device, "recommended", initial)
        for _ in range(3):
            worker.step()
        comm.barrier()
        profiler = profile(activities=activities)
        if comm.rank == 0:
            profiler.__enter__()
        comm.barrier("profiling")
        for _ in range(NUM_TRACED):
            worker.step()
        comm.barrier("profiled")
        if comm.rank == 0:
            profiler.__exit__(None, None, None)
        return profiler

    profiler = run_local(NUM_WORKERS, work)[0]
    found = counts(profiler)
    each = {key: found[key] for key in ("launches", "waits", "busy_ms")}
    proof.add("a step of four workers", summary(found) + f" in {NUM_TRACED} steps", **each)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as a, gzip.open(proof.out / "timeline.json.gz", "wb") as b:
            shutil.copyfileobj(a, b)
    draw(proof, profiler)


def draw(proof: Proof, profiler: Any) -> None:
    """Draw the ranges of the host, and what runs on the device, ours apart from torch's."""
    rows: dict[str, list[tuple[float, float, str]]] = {}
    events = [e for e in profiler.events() if e.time_range.elapsed_us() > 0]
    for event in events:
        span = event.time_range.start / 1e3, event.time_range.elapsed_us() / 1e3
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if event.name not in COLOURS:  # the host's ranges, as the device sees them
                rows.setdefault(f"GPU, {kind(event.name)}", []).append((*span, kind(event.name)))
        elif event.name in COLOURS:
            rows.setdefault(f"host, thread {event.thread}", []).append((*span, event.name))
    begin_ms = min(span[0] for spans in rows.values() for span in spans)
    figure, axes = tables.new_picture()
    figure.set_size_inches(12, 1 + 0.4 * len(rows))
    for place, (_, spans) in enumerate(sorted(rows.items())):
        axes.broken_barh([(a - begin_ms, b) for a, b, _ in spans], (place - 0.4, 0.8),
                         facecolors=[COLOURS[what] for *_, what in spans])  # fmt: skip
    axes.set_yticks(range(len(rows)), sorted(rows))
    axes.set_xlabel("ms")
    tables.save_picture(figure, proof.out / "timeline.png")
    proof.add("timeline", f"{len(events)} events in timeline.json.gz, drawn in timeline.png")


COLOURS = {"forward": "tab:gray", "backward": "tab:blue", "exchange": "tab:orange",
           "copies": "tab:green", "torch": "tab:blue", "ours": "tab:orange"}  # fmt: skip
OURS = ("step_", "accumulate", "select", "pack", "unpack", "observe", "take", "cover", "factored",
        "sketch", "restore", "round", "sum_of")  # fmt: skip


def kind(name: str) -> str:
    if name.startswith(("Memcpy", "Memset")):
        return "copies"
    return "ours" if name.startswith(OURS) else "torch"


if __name__ == "__main__":
    main()
