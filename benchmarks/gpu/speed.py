"""Stage 2: optimizers on a large tensor, on many small ones and on a mixture; selecting; packing.

Each in milliseconds, beside torch's fused and foreach Adam and (if there) bitsandbytes, with what
one step launches and how often the host waits.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import packing_speed, selection_speed
from benchmarks.contenders import BASELINE, state_bytes
from benchmarks.gpu.common import Proof, begin, counted, emulated, summary
from benchmarks.small_tensors import FOREACH, optimizer_of
from benchmarks.turns import COPY, Times, ratio, take_turns

GOAL_SHARE = 0.8
TORCH = (BASELINE, FOREACH)
EIGHT_BIT = "8-bit Adam"
LARGE = ("momentum", "SM3", "SM3Adam", "SM3, momentum 0.9", "FactoredAdam, beta1 = 0",
         "FactoredAdam", "Adam, full, ours", "CMS, beta1 = 0", "CS-MV")  # fmt: skip
MANY = ("SM3", "SM3Adam", "FactoredAdam, beta1 = 0", "FactoredAdam", "Adam, full, ours",
        "CMS, beta1 = 0")  # fmt: skip
WITH_GOAL = ("SM3", "FactoredAdam, beta1 = 0")


def main() -> None:
    proof = begin("2", __doc__)
    optimizers(proof, "large", [tuple(proof.size((8192, 8192), (64, 96)))], LARGE)
    optimizers(proof, "1000 of 64", [(8, 8)] * proof.size(1000, 20), MANY)
    optimizers(proof, "mixture", mixture(*proof.size((1024, 24), (16, 2))), MANY)
    selecting(proof)
    packing(proof)


def mixture(width: int, num_layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of a Transformer's layers, without its embedding."""
    h = width
    layer = [(h, h), (h,)] * 4 + [(4 * h, h), (4 * h,), (h, 4 * h), (h,)] + [(h,)] * 4
    return layer * num_layers


def contender(name: str, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(1)
    like = {"generator": generator, "device": device}
    parameters = [torch.nn.Parameter(torch.randn(shape, **like)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, **like)
    return optimizer_of(name, parameters, is_compressed=False)


def optimizers(
    proof: Proof, title: str, shapes: Sequence[tuple[int, ...]], names: Sequence[str]
) -> None:
    """Time each beside the fused Adam alone, so that few are in memory at a time."""
    if importlib.util.find_spec("bitsandbytes"):
        names = (*names, EIGHT_BIT)
    device = proof.device
    size = sum(torch.Size(shape).numel() for shape in shapes)
    source = torch.randn(size, device=device)
    target = torch.zeros_like(source)
    baseline = contender(BASELINE, shapes, device)
    for name in (BASELINE, FOREACH, *names):
        each = baseline if name == BASELINE else contender(name, shapes, device)
        work = {BASELINE: baseline.step, name: each.step, COPY: lambda: target.copy_(source)}
        times = take_turns(work, proof.size(12, 2), device)
        traffic = 12 * size + 2 * state_bytes(each)
        share = traffic / (8 * size) / ratio(times, name, COPY)
        found = counted_step(name, each, shapes, device)
        has_goal = title == "large" and name in WITH_GOAL
        goal = ("dense SM3 and factored steps at 80% of a copy's bandwidth", share >= GOAL_SHARE)
        proof.add(
            f"{name}, {title}", text(times, name, share, found), goal if has_goal else None,
            ms=statistics.median(times[name]), least_ms=min(times[name]), share=share,
            of_adam=ratio(times, name, BASELINE), copy_ms=statistics.median(times[COPY]), **found,
        )  # fmt: skip
        del each, work


def counted_step(name: str, each: Any, shapes: Any, device: torch.device) -> dict[str, Any]:
    """Count a step's launches; without a GPU those of another such optimizer, which is emulated."""
    if device.type == "cuda":
        return counted(each.step, device)
    with emulated():
        other = contender(name, shapes, device)
        other.step()
        return counted(other.step, device)


def text(times: Times, name: str, share: float, found: dict[str, Any]) -> str:
    return (f"{statistics.median(times[name]):.3f} ms, {ratio(times, name, BASELINE):.2f} fused "
            f"Adams, {share:.0%} of a copy's bandwidth; {summary(found)}")  # fmt: skip


def selecting(proof: Proof) -> None:
    """Accumulate and select in one pass, as selection_speed.py does."""
    options = argparse.Namespace(
        numel=proof.size(2**26, 20_000), density=0.001, rounds=proof.size(10, 2),
        device=str(proof.device),
    )  # fmt: skip
    for row in selection_speed.measure(options):
        share = share_of_selecting(row["way"], row["of_copy"])
        goal = None
        if row["way"].startswith("fused") and not row["way"].endswith("velocity"):
            goal = ("accumulate and select at 80% of a copy's bandwidth", share >= GOAL_SHARE)
        told = f", {share:.0%} of a copy's bandwidth" if row["way"] != COPY else ""
        proof.add(f"selecting: {row['way']}", f"{row['ms']:.3f} ms, {row['of_copy']:.2f} copies, "
                  f"{row['faster_than_torch_operations']:.1f} x torch operations{told}",
                  goal, **row)  # fmt: skip
    if proof.is_rehearsal:
        options.numel = 3000
    count_selecting(proof, options)


def share_of_selecting(way: str, of_copy: float) -> float:
    """Bytes that must move (gradient read, each buffer read and written) against a copy's 8."""
    bytes_of = {"float32": 4, "bfloat16": 2, "int8": 1}
    stored = next((size for dtype, size in bytes_of.items() if dtype in way), 4)
    num_buffers = 2 if way.endswith("velocity") else 1
    return (4 + 2 * stored * num_buffers) / 8 / of_copy


def count_selecting(proof: Proof, options: argparse.Namespace) -> None:
    grad_N = torch.randn(options.numel, device=proof.device)
    with emulated() if proof.is_rehearsal else nullcontext():
        each = selection_speed.Fused(grad_N, "bfloat16", False, round(options.numel * 0.001))
        each.step()
        found = counted(each.step, proof.device)
    proof.add("selecting: counted", summary(found), **found)


def packing(proof: Proof) -> None:
    options = argparse.Namespace(
        numel=proof.size(21_000_000, 20_000), entries=proof.size(21_000, 200), workers=[4],
        index_coding="elias_fano", rounds=proof.size(8, 2), device=str(proof.device),
    )  # fmt: skip
    for row in packing_speed.measure(options):
        proof.add(f"packing: {row['operation']}", f"{row['ms']:.3f} ms", **row)
    with emulated() if proof.is_rehearsal else nullcontext():
        work: dict[str, tuple[Callable[[], Any], int]] = packing_speed.operations(options)
        for name in ("pack mxfp8", "unpack mxfp8", "merge of 4"):
            found = counted(work[name][0], proof.device)
            proof.add(f"packing: {name}, counted", summary(found), **found)


if __name__ == "__main__":
    main()
