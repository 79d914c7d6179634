"""How far are the second moments of each structure from the exact ones, in a real training run?

    OMP_NUM_THREADS=1 python benchmarks/estimation_error.py --data wikitext-2 \
        --json benchmarks/results/estimation-error.json \
        --picture benchmarks/results/estimation-error.png

Dense Adam trains a word model on WikiText-2. Beside it every structure is fed the same gradients,
by its own kernel (an optimizer with rate 0). The true moment of an element is the average of g^2
that forgets with 0.999, or the sum of g^2. What is compared is sqrt(estimate), by which a step
divides. For a cover, this is the value that the step uses, not the larger accumulator after it.
error = |sqrt(estimate) - sqrt(true)| / |sqrt(true)|, 2-norms over the elements of a kind of tensor;
ratio = sqrt(estimate) / sqrt(true) where the true moment is not 0: median, 5% and 95% quantile.
"""

from __future__ import annotations

import argparse
import operator
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import optim
from benchmarks import tables
from benchmarks.words import WordModel, batches, clip_gradients, read_corpus

BETA = 0.999
BATCH_SIZE = 10
SUMS = "sum"
AVERAGES = "average"
# name -> (which true moment it estimates, options of the optimizer that keeps it)
STRUCTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": (AVERAGES, {"second_moment": "full"}),
    "factored": (AVERAGES, {"second_moment": "factored"}),
    "cover": (AVERAGES, {"second_moment": "cover"}),
    "count-min 5%": (AVERAGES, {"second_moment": "sketch", "size_ratio": 0.05}),
    "count-min 20%": (AVERAGES, {"second_moment": "sketch", "size_ratio": 0.2}),
    "count-min 40%": (AVERAGES, {"second_moment": "sketch", "size_ratio": 0.4}),
    "full, sum": (SUMS, {"second_moment": "full"}),
    "cover, sum": (SUMS, {"second_moment": "cover"}),
    "count-min 20%, sum": (SUMS, {"second_moment": "sketch", "size_ratio": 0.2}),
    "count-min 20%, sum, cleaned": (
        SUMS,
        {"second_moment": "sketch", "size_ratio": 0.2, "clean_interval": 125},
    ),
}


def main() -> None:
    options = parse()
    rows = measure(options)
    print_pivoted(rows, options.steps)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(rows, options.picture)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--data", type=tables.path, required=True, help="folder of WikiText-2")
    parser.add_argument("--words", type=int, default=3000, help="the most frequent; others <unk>")
    parser.add_argument("--width", type=int, default=64, help="of embedding and LSTM")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 100, 1000, 10_000],
                        help="the table's; the last ends the run")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=tables.path, help="draw errors over steps here")
    return parser.parse_args()


class Follower:
    """One structure for each of the model's matrices, fed by the optimizer that keeps it."""

    def __init__(self, name: str, matrices: dict[str, Tensor]) -> None:
        self.name = name
        self.kind, settings = STRUCTURES[name]
        self.shadows = {key: torch.zeros_like(matrix) for key, matrix in matrices.items()}
        settings = {"lr": 0.0, "min_compressed_numel": 0, **settings}
        for shadow in self.shadows.values():
            shadow.requires_grad_()
        if self.kind == SUMS:
            self.optimizer = optim.Adagrad(self.shadows.values(), **settings)
        else:
            self.optimizer = optim.Adam(self.shadows.values(), betas=(0.0, BETA), **settings)

    def feed(self, gradients: dict[str, Tensor]) -> None:
        for key, shadow in self.shadows.items():
            shadow.grad = gradients[key]
        self.optimizer.step()

    def estimates(self) -> dict[str, Tensor]:
        return {key: self.optimizer.estimate(shadow) for key, shadow in self.shadows.items()}

    def used(self, before: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the moments by whose roots the last step divided; before: estimates before it."""
        if STRUCTURES[self.name][1]["second_moment"] != "cover":
            return self.estimates()
        old, new = (1.0, 1.0) if self.kind == SUMS else (BETA, 1 - BETA)
        return {key: old * before[key] + new * g.square() for key, g in gradients.items()}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    corpus = read_corpus(options.data, options.words)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    model = WordModel(corpus, options.width, dropout=0.2)
    matrices = {n: p.detach() for n, p in model.named_parameters() if p.dim() == 2}
    followers = [Follower(name, matrices) for name in STRUCTURES]
    true = {kind: {key: torch.zeros_like(m) for key, m in matrices.items()}
            for kind in (SUMS, AVERAGES)}  # fmt: skip
    rows, start = [], time.perf_counter()
    for step, gradients in enumerate(train(model, corpus.train, options), 1):
        is_check = step in options.steps or is_drawn(step)
        before = [each.estimates() if is_check else {} for each in followers]
        for each in followers:
            each.feed(gradients)
        for key, g in gradients.items():
            true[SUMS][key].addcmul_(g, g)
            true[AVERAGES][key].mul_(BETA).addcmul_(g, g, value=1 - BETA)
        if is_check:
            for each, old in zip(followers, before, strict=True):
                rows += compare(each.used(old, gradients), true[each.kind], each.name, step)
            seconds = time.perf_counter() - start
            print(f"step {step}: {seconds:.0f} s", file=sys.stderr, flush=True)
    facts = {"words": corpus.num_words, "width": options.width, "batch": BATCH_SIZE,
             "lr": options.lr, "seed": options.seed, "torch": torch.__version__}  # fmt: skip
    return [row | facts for row in rows]


def is_drawn(step: int) -> bool:
    """Tell whether the picture has a point at this step: 1, 3, 10, 30, 100, ..."""
    return str(step).strip("0") in ("1", "3")


def train(
    model: WordModel, text: Tensor, options: argparse.Namespace
) -> Iterator[dict[str, Tensor]]:
    """Train with dense Adam; yield the clipped gradients of the matrices in each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    step = 0
    while True:
        hidden = None
        for words, targets in batches(text, BATCH_SIZE):
            loss, hidden = model.loss(words, targets, hidden)
            optimizer.zero_grad()
            loss.backward()
            clip_gradients(model, 1.0)
            yield {n: p.grad for n, p in model.named_parameters() if p.dim() == 2}
            optimizer.step()
            step += 1
            if step == max(options.steps):
                return


def compare(
    estimates: dict[str, Tensor], true: dict[str, Tensor], structure: str, step: int
) -> list[dict[str, Any]]:
    """Return a row for each kind of tensor: embedding, recurrent, softmax."""
    rows = []
    for kind in ("embedding", "recurrent", "softmax"):
        keys = [key for key in true if key.startswith(kind)]
        estimate, exact = (
            torch.cat([moments[key].flatten() for key in keys]).double().sqrt()
            for moments in (estimates, true)
        )
        ratios = (estimate / exact)[exact > 0].sort().values
        low, median, high = (float(ratios[int(q * (len(ratios) - 1))]) for q in (0.05, 0.5, 0.95))
        rows.append({
            "step": step,
            "structure": structure,
            "tensor": kind,
            "shapes": [list(true[key].shape) for key in keys],
            "error": float((estimate - exact).norm() / exact.norm()),
            "ratio_low": low,
            "ratio_median": median,
            "ratio_high": high,
            "nonzero": len(ratios) / len(exact),
        })  # fmt: skip
    return rows


def print_pivoted(rows: list[dict[str, Any]], steps: list[int]) -> None:
    """Print a line for each structure and tensor, a cell for each step."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["structure"], row["tensor"]), dict(row))
        spread = f"{row['ratio_low']:.2g} to {row['ratio_high']:.2g}"
        line[row["step"]] = f"{row['error']:.2f}; {row['ratio_median']:.2f} ({spread})"
    columns: dict[str, Any] = {name: operator.itemgetter(name) for name in ("structure", "tensor")}
    for step in steps:
        columns[f"step {step:,}: error; ratio"] = operator.itemgetter(step)
    tables.print_table(list(lines.values()), columns)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the error over steps for each kind of tensor: a line for each structure, dashed for
    sums."""
    figure, all_axes = tables.new_picture(columns=3)
    for axes, tensor in zip(all_axes, ("embedding", "recurrent", "softmax"), strict=True):
        for number, name in enumerate(name for name in STRUCTURES if not name.startswith("full")):
            points = [
                (row["step"], row["error"])
                for row in rows
                if row["tensor"] == tensor and row["structure"] == name
            ]
            style = "--" if STRUCTURES[name][0] == SUMS else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", color=f"C{number}", label=name)
        axes.set(xscale="log", yscale="log", ylim=(0.02, 20), xlabel="step", title=tensor)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("relative error of sqrt(second moment)")
    all_axes[0].legend(fontsize=7)
    tables.save_picture(figure, path)


if __name__ == "__main__":
    main()
