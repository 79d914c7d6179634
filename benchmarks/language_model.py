"""What small optimizer state costs in perplexity: the count-sketch paper's word language model.

    OMP_NUM_THREADS=1 python benchmarks/language_model.py --data wikitext-2 --jobs 2 \
        --json benchmarks/results/language-model.json \
        --picture benchmarks/results/language-model.png

WikiText-2, 2-layer LSTM, full softmax, BPTT 35, batch 20 (Spring et al. 2019). `--scale full` has
the paper's size. `--scale short` takes half an hour on two cores: fewer words, a narrower network,
a third of an epoch. Of each method's rates, the one that is best on the validation text counts.
Runs that are in --out already are not run again.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import runs, tables
from benchmarks.contenders import state_bytes, synchronize
from benchmarks.methods import METHODS, make_optimizer, takes_row_sparse
from benchmarks.words import (
    Corpus,
    WordModel,
    batches,
    clip_gradients,
    perplexity,
    rate_factor,
    read_corpus,
)

BATCH_SIZE = 20


@dataclass(frozen=True)
class Scale:
    """The size of the training. A check measures the perplexity of validation text."""

    num_words: int
    width: int
    dropout: float
    epochs: int
    steps: int | None  # None: `epochs` whole epochs
    steps_per_check: int | None  # None: once an epoch
    check_words: int | None  # None: the whole validation text
    cuts_rate_when_stalled: bool  # divides it by 4, as the paper does; False: rate_factor


SCALES = {
    "short": Scale(4000, 128, 0.2, 1, 1000, 100, 14_000, False),
    "full": Scale(33_278, 672, 0.5, 40, None, None, None, True),
    "smoke": Scale(500, 16, 0.2, 1, 20, 10, 2_000, False),
}


def main() -> None:
    options = parse()
    scale = SCALES[options.scale]
    settings_of_runs = [
        {
            "method": method,
            "lr": lr,
            "seed": seed,
            "sparse_embedding": options.sparse_embedding and takes_row_sparse(method),
            "device": options.device,
            "scale": asdict(scale),
        }
        for method in options.methods
        for lr in options.rates or METHODS[method].rates
        for seed in options.seeds
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(settings, options.data, options.out) for settings in settings_of_runs]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, runs.use_one_thread) as pool:
        results = pool.starmap(run_once, jobs, chunksize=1)
    rows = [summarize(method, results) for method in options.methods]
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)
    if options.picture:
        draw(rows, options.picture)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--data", type=tables.path, required=True, help="folder of WikiText-2")
    parser.add_argument("--scale", choices=SCALES, default="short")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each method's own grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--sparse-embedding", action=argparse.BooleanOptionalAction, default=True,
                        help="row-sparse gradients where the method takes them")  # fmt: skip
    parser.add_argument("--out", type=tables.path, default=Path("/tmp/lm_runs"),
                        help="a file a run")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=tables.path, help="draw the curves here")
    return parser.parse_args()


def run_once(settings: dict[str, Any], data: Path, out: Path) -> dict[str, Any]:
    """Return a run's result, after running it if it is not there."""
    words = [settings["method"], f"width-{settings['scale']['width']}", f"lr-{settings['lr']:g}"]
    words += [f"seed-{settings['seed']}", *(["rows"] if settings["sparse_embedding"] else [])]
    path = out / re.sub(r"[^\w.-]+", "-", f"{'.'.join(words)}.json")
    result = runs.read_result(path, settings)
    if result is None:
        corpus = read_corpus(data, settings["scale"]["num_words"])
        result = runs.keep_result(path, Run(settings, corpus).train())
        print(f"{path.name}: {result['valid_perplexity']}", file=sys.stderr, flush=True)
    return result


class Run:
    """One training of one method at one rate."""

    def __init__(self, settings: dict[str, Any], corpus: Corpus) -> None:
        self.settings = settings
        self.scale = Scale(**settings["scale"])
        self.method = METHODS[settings["method"]]
        device = torch.device(settings["device"])
        torch.manual_seed(settings["seed"])
        self.model = WordModel(
            corpus, self.scale.width, self.scale.dropout, settings["sparse_embedding"]
        ).to(device)
        self.optimizer = make_optimizer(settings["method"], self.model, settings["lr"])
        self.train_text, self.valid_text, self.test_text = (
            text.to(device) for text in (corpus.train, corpus.valid, corpus.test)
        )
        self.best_weights: dict[str, torch.Tensor] = {}
        self.curve: list[tuple[int, float]] = []
        self.step_ms: list[float] = []
        self.update_ms: list[float] = []

    def train(self) -> dict[str, Any]:
        steps_per_epoch = sum(1 for _ in batches(self.train_text, BATCH_SIZE))
        num_steps = self.scale.steps or self.scale.epochs * steps_per_epoch
        per_check = self.scale.steps_per_check or steps_per_epoch
        cuts, factor, hidden = self.scale.cuts_rate_when_stalled, 1.0, None
        for step, (words, targets) in zip(range(num_steps), self._endless(), strict=False):
            if step % steps_per_epoch == 0:
                hidden = None
            self._set_rate(factor if cuts else rate_factor(step, num_steps))
            loss, hidden = self._step(words, targets, hidden)
            if not math.isfinite(loss):
                return self._result(step + 1, math.inf, math.inf)
            if (step + 1) % per_check == 0 and self._check(step + 1):
                factor /= 4
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        valid, test = (
            perplexity(self.model, t, BATCH_SIZE) for t in (self.valid_text, self.test_text)
        )
        return self._result(num_steps, valid, test)

    def _endless(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from batches(self.train_text, BATCH_SIZE)

    def _set_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * factor

    def _step(self, words: torch.Tensor, targets: torch.Tensor, hidden: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        loss, hidden = self.model.loss(words, targets, hidden)
        self.optimizer.zero_grad()
        loss.backward()
        clip_gradients(self.model, self.method.clip)
        value, before_update = float(loss.detach()), time.perf_counter()
        self.optimizer.step()
        synchronize(words.device)
        end = time.perf_counter()
        self.update_ms.append(1e3 * (end - before_update))
        self.step_ms.append(1e3 * (end - start))
        return value, hidden

    def _check(self, step: int) -> bool:
        """Add a point to the curve; return whether it is no better than all points before."""
        value = perplexity(self.model, self.valid_text[: self.scale.check_words], BATCH_SIZE)
        is_stalled = value >= min((earlier for _, earlier in self.curve), default=math.inf)
        self.curve.append((step, value))
        if self.scale.cuts_rate_when_stalled and not is_stalled:  # the paper tests the best weights
            weights = self.model.state_dict()
            self.best_weights = {name: weight.clone() for name, weight in weights.items()}
        return is_stalled

    def _result(self, steps: int, valid: float, test: float) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "steps": steps,
            "valid_perplexity": valid,
            "test_perplexity": test,
            "curve": self.curve,
            "state_bytes": state_bytes(self.optimizer),
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
            "step_ms": statistics.median(self.step_ms),
            "update_ms": statistics.median(self.update_ms),
        }


def summarize(method: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: the rate with the least mean validation perplexity, and its test perplexity."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for result in results:
        if result["settings"]["method"] == method:
            by_rate.setdefault(result["settings"]["lr"], []).append(result)
    valid = {
        lr: statistics.mean(r["valid_perplexity"] for r in runs) for lr, runs in by_rate.items()
    }
    lr = min(valid, key=valid.__getitem__)
    chosen = by_rate[lr]
    first = chosen[0]
    return {
        "method": method,
        "test_perplexity": statistics.mean(r["test_perplexity"] for r in chosen),
        "test_perplexities": [r["test_perplexity"] for r in chosen],
        "valid_perplexity_of_rate": valid,
        "lr": lr,
        "is_edge_of_grid": len(valid) > 1 and lr in (min(valid), max(valid)),
        "state_bytes": first["state_bytes"],
        "state_bytes_per_parameter": first["state_bytes"] / first["num_parameters"],
        "step_ms": statistics.median(r["step_ms"] for r in chosen),
        "update_ms": statistics.median(r["update_ms"] for r in chosen),
        "num_parameters": first["num_parameters"],
        "steps": first["steps"],
        "settings": first["settings"],
        "curve": first["curve"],
    }


COLUMNS: tables.Columns = {
    "method": lambda row: row["method"],
    "test perplexity": lambda row: f"{row['test_perplexity']:.2f}",
    "each seed": lambda row: ", ".join(f"{p:.2f}" for p in row["test_perplexities"]),
    "rate": lambda row: f"{row['lr']:g}{' (edge of its grid)' * row['is_edge_of_grid']}",
    "state bytes": lambda row: f"{row['state_bytes']:,}",
    "a parameter": lambda row: f"{row['state_bytes_per_parameter']:.2f}",
    "ms a step": lambda row: f"{row['step_ms']:.0f}",
    "of it the optimizer": lambda row: f"{row['update_ms']:.1f}",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw validation perplexity over steps: a line for each method, at its best rate."""
    from matplotlib import colormaps

    figure, axes = tables.new_picture()
    for number, row in enumerate(rows):
        style = "-" if number < 10 else "--"
        color = colormaps["tab10"](number % 10)
        points = row["curve"] or [(0, math.nan)]  # it diverged before its first check
        axes.plot(*zip(*points, strict=True), style, color=color, label=row["method"])
    best = min(value for row in rows for _, value in row["curve"])
    axes.set(xlabel="step", ylabel="perplexity, validation text", yscale="log",
             ylim=(0.95 * best, 4 * best))  # fmt: skip
    axes.legend(fontsize=7)
    tables.save_picture(figure, path)


if __name__ == "__main__":
    main()
