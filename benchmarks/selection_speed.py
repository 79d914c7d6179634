"""How long do accumulating, selecting and masking take: in one pass, and as they usually are?

    OMP_NUM_THREADS=1 python benchmarks/selection_speed.py --json benchmarks/results/selection.json

One tensor of 8.4 million elements, of which a thousandth is selected. In each round every contender
makes one step, in turn. Ratios are taken within a round, so that what else the machine does falls
on all; their median over rounds is given.
"Fused" is the pass of parsimony_kernels/buffers/ops.py with the right threshold. It writes new
buffers, here always the same, and keeps the old ones, so that a step can be undone. In a program
the new velocity is "new memory each step"; "lagging" is what plain momentum in float32 does instead
(dgc/worker/lagging.py), in the gradient's memory. "Torch operations" is the way of the
predecessors, in float32 and in place: the threshold comes from a sample of 1% and is then adapted,
indices come from `nonzero`. Before anything is timed, the fused pass is compared with plain torch,
bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import tables
from benchmarks.turns import COPY, Times, ratio, take_turns
from dgc.selection.plan import plan_sparsity
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Correction, Selection
from parsimony_kernels.step import ops

MOMENTUM = 0.9
SAMPLE_RATIO, LOWERED, MOST_TRIES = 0.01, 0.8, 10  # of the predecessors' threshold


def main() -> None:
    options = parse()
    rows = measure(options)
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--numel", type=int, default=2**23)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


# ---- the fused pass ------------------------------------------------------------------------------


class Fused:
    """The fused pass from old buffers to new ones; every call does the same."""

    def __init__(self, grad_N: Tensor, dtype: str, with_velocity: bool, k: int) -> None:
        n, device = grad_N.numel(), grad_N.device
        self.grad_N, self.with_velocity = grad_N, with_velocity
        self.correction = Correction(MOMENTUM, 1, 1, 0) if with_velocity else Correction()
        self.old = [filled(n, dtype, device, seed) for seed in range(1 + with_velocity)]
        self.new = [buffers.empty(n, dtype, device) for _ in self.old]
        plan = plan_sparsity(n, k / n)
        self.run(None)
        threshold = buffers.decode(self.new[0]).abs().topk(k).values.min().item()
        self.selection = Selection(threshold, plan.capacity, sample_every=plan.sample_every)

    def run(self, selection: Selection | None) -> buffers.Found:
        velocity, old_velocity = (self.new[1], self.old[1]) if self.with_velocity else (None, None)
        return buffers.accumulate(
            self.grad_N, self.correction, residual=self.new[0], old_residual=self.old[0],
            velocity=velocity, old_velocity=old_velocity, key=7, selection=selection,
        )  # fmt: skip

    def step(self) -> None:
        found = self.run(self.selection)
        (report,) = buffers.read_reports([found])
        found.entries(report.count)

    def results(self) -> list[Tensor]:
        found = self.run(self.selection)
        (report,) = buffers.read_reports([found])
        entries = [part for part in found.entries(report.count) if part is not None]
        kept = [part.clone() for buffer in self.new for part in buffers.tensors(buffer)]
        return [found.report, *entries, *kept]

    def check(self) -> None:
        with ops.use("reference"):
            expected = self.results()
        for a, b in zip(self.results(), expected, strict=True):
            assert torch.equal(a, b), "the fused pass differs from plain torch"


class InNewMemory(Fused):
    """The same as a program does it: what is written anew is allocated in each step."""

    def step(self) -> None:
        grad_N = self.grad_N
        n, device = grad_N.numel(), grad_N.device
        # The residual takes the gradient's place.
        self.new = [self.new[0], *(buffers.empty(n, "float32", device) for _ in self.old[1:])]
        super().step()


class Lagging:
    """The pass that leaves a residual one velocity behind, in no memory but the gradient's."""

    def __init__(self, like: Fused) -> None:
        self.like, self.old = like, like.old
        self.residual, self.velocity = (torch.empty_like(each) for each in self.old)
        self.owed = like.old[0] - like.old[1]

    def reset(self) -> None:
        self.residual.copy_(self.owed)
        self.velocity.copy_(self.like.grad_N)

    def step(self) -> tuple[Tensor, Tensor, Tensor | None]:
        found = buffers.accumulate_lagging(
            self.velocity, MOMENTUM, self.like.selection, residual=self.residual,
            velocity=self.velocity, old_velocity=self.old[1], is_lagging=True,
        )  # fmt: skip
        (report,) = buffers.read_reports([found])
        self.residual.index_fill_(0, found.indices[: report.count], 0.0)
        return found.entries(report.count)

    def check(self) -> None:
        self.reset()
        actual = [*self.step(), self.residual.clone()]
        self.reset()
        with ops.use("reference"):
            expected = [*self.step(), self.residual]
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b), "the lagging pass differs from plain torch"


def filled(n: int, dtype: str, device: torch.device, seed: int) -> buffers.Buffer:
    buffer = buffers.empty(n, dtype, device)
    values_N = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(device)
    buffers.accumulate(values_N, Correction(), residual=buffer, old_residual=None)
    return buffer


# ---- as usually written --------------------------------------------------------------------------


class TorchOperations:
    """DGC's rule as one torch operation after another, with momentum correction in place."""

    def __init__(self, grad_N: Tensor, with_velocity: bool, k: int) -> None:
        n = grad_N.numel()
        self.grad_N, self.k = grad_N, k
        self.start = [filled(n, "float32", grad_N.device, s) for s in range(1 + with_velocity)]
        self.kept = [each.clone() for each in self.start]
        self.generator = torch.Generator(grad_N.device).manual_seed(0)

    def reset(self) -> None:
        for kept, start in zip(self.kept, self.start, strict=True):
            kept.copy_(start)

    def step(self) -> tuple[Tensor, Tensor]:
        residual, *velocity = self.kept
        if velocity:
            velocity[0].mul_(MOMENTUM).add_(self.grad_N)
        residual.add_(velocity[0] if velocity else self.grad_N)
        magnitude_N = residual.abs()
        indices_K = self.select(magnitude_N)
        values_K = residual[indices_K]
        for kept in self.kept:
            kept.index_fill_(0, indices_K, 0.0)
        return indices_K, values_K

    def select(self, magnitude_N: Tensor) -> Tensor:
        n = magnitude_N.numel()
        num_samples = int(n * SAMPLE_RATIO)
        positions = torch.randint(
            n, (num_samples,), generator=self.generator, device=magnitude_N.device
        )
        rank = max(1, round(num_samples * self.k / n))
        threshold = magnitude_N[positions].topk(rank, sorted=False).values.min()
        for _ in range(MOST_TRIES):
            indices_K = (magnitude_N >= threshold).nonzero().view(-1)
            if indices_K.numel() > 1.3 * self.k:
                kept = magnitude_N[indices_K].topk(self.k, sorted=False).indices
                return indices_K[kept]
            if indices_K.numel() >= 0.8 * self.k:
                break
            threshold = threshold * LOWERED
        return indices_K

    def check(self) -> None:
        self.reset()
        indices_K, values_K = self.step()
        assert 0.8 * self.k <= indices_K.numel() <= 1.3 * self.k
        assert values_K.abs().min() >= self.kept[0].abs().max()


# ---- measuring -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(9)
    grad_N = 0.1 * torch.randn(options.numel, generator=generator).to(device)
    k = round(options.numel * options.density)
    target_N = torch.zeros_like(grad_N)
    work: dict[str, Callable[[], Any]] = {COPY: lambda: target_N.copy_(grad_N)}
    prepare: dict[str, Callable[[], Any]] = {}
    for with_velocity in (False, True):
        usual = TorchOperations(grad_N, with_velocity, k)
        usual.check()
        name = f"torch operations{velocity_name(with_velocity)}"
        work[name], prepare[name] = usual.step, usual.reset
        for dtype in buffers.DTYPES:
            fused = Fused(grad_N, dtype, with_velocity, k)
            fused.check()
            work[f"fused, {dtype}{velocity_name(with_velocity)}"] = fused.step
            if dtype == "float32" and with_velocity:
                anew, lagging = InNewMemory(grad_N, dtype, True, k), Lagging(fused)
                lagging.check()
                work["fused, float32, new memory each step, velocity"] = anew.step
                name = "fused, float32, lagging, velocity"
                work[name], prepare[name] = lagging.step, lagging.reset
    times = take_turns(work, options.rounds, device, prepare)
    return [row(name, times, options) for name in work]


def velocity_name(with_velocity: bool) -> str:
    return ", velocity" if with_velocity else ""


def row(name: str, times: Times, options: argparse.Namespace) -> dict[str, Any]:
    usual = f"torch operations{velocity_name(name.endswith('velocity'))}"
    return {
        "way": name,
        "ms": statistics.median(times[name]),
        "of_copy": ratio(times, name, COPY),
        "faster_than_torch_operations": ratio(times, usual, name),
        "numel": options.numel,
        "density": options.density,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "torch": torch.__version__,
    }


COLUMNS: tables.Columns = {
    "way": lambda row: row["way"],
    "ms": lambda row: f"{row['ms']:.1f}",
    "× copy": lambda row: f"{row['of_copy']:.2f}",
    "× faster than torch operations": lambda row: f"{row['faster_than_torch_operations']:.1f}",
}


if __name__ == "__main__":
    main()
