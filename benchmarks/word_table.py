"""The count-sketch paper's table for WikiText-2, on real ranks, with dense and sparse exchange.

    python benchmarks/word_table.py --data /path/to/wikitext-2 --json \\
        benchmarks/results/word-table.json

Runs train.py under horovodrun: 2-layer LSTM (Spring et al. 2019, section 5), BPTT 35, 20 texts a
rank; Adam, CS-MV, CS-V, SM3, momentum, CS-momentum; the whole gradient is exchanged, or 1% of it.
As in the paper, sketches keep the state of embedding and softmax, and the LSTM has full state.

    --softmax full       dense gradients of embedding and softmax, as in the paper
    --softmax sampled    row-sparse gradients of both; rows are exchanged as rows
    --scale short        8,000 words, 128 wide, --steps steps; a run takes minutes on two cores
    --scale full         size, epochs and rates of the paper, and its cuts of the rate; for a GPU

A row has the rate with the least perplexity on the validation text. Runs that are complete are not
run again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import runs, tables

BATCH_SIZE = 20


@dataclass(frozen=True)
class Method:
    """An optimizer, as config files, and the rates to try."""

    files: tuple[str, ...]
    rates: tuple[float, ...]  # at --scale short
    paper_rate: float  # at --scale full
    clip: float = 1.0  # bound of the gradient's norm
    rival: str = ""  # the method that it is compared with: the same without sketches


ADAM, MOMENTUM = "Adam", "momentum"
WORDS_ONLY = "optim/words_only"
METHODS = {
    ADAM: Method(("optim/lazy_adam",), (5e-3, 1e-2, 2e-2), 1e-3),
    "CS-MV": Method(("optim/sketch_adam", WORDS_ONLY), (1e-2, 2e-2), 1e-3, rival=ADAM),
    "CS-V": Method(("optim/sketch_adam_v", WORDS_ONLY), (1e-2, 2e-2), 1e-3, rival=ADAM),
    "SM3": Method(("optim/sm3",), (3e-3, 1e-2), 0.03, rival=ADAM),
    MOMENTUM: Method(("optim/momentum",), (5.0, 10.0), 2.5, clip=0.25),
    "CS-momentum": Method(
        ("optim/sketch_momentum", WORDS_ONLY), (5.0, 10.0), 2.5, clip=0.25, rival=MOMENTUM
    ),
}
SPARSE = ("dgc/wm0", "dgc/density_1_percent", "dgc/mxfp8")


def main() -> None:
    options = parse()
    rows = []
    for exchange in options.exchanges:
        for name in options.methods:
            for size_ratio in options.size_ratios if name.startswith("CS") else [None]:
                rates = options.rates or rates_of(METHODS[name], options)
                results = [run(options, name, exchange, lr, size_ratio) for lr in rates]
                rows.append(summarize(name, exchange, size_ratio, results))
                tables.print_table(rows, COLUMNS)
    add_gaps(rows)
    tables.print_table(rows, COLUMNS)
    tables.write_json(rows, options.json)


def parse() -> argparse.Namespace:
    parser = tables.parser(__doc__)
    parser.add_argument("--data", type=tables.path, required=True, help="folder of WikiText-2")
    parser.add_argument("--softmax", choices=["full", "sampled"], default="full")
    parser.add_argument("--scale", choices=["short", "full"], default="short")
    parser.add_argument("--steps", type=int, default=600, help="of --scale short")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--exchanges", nargs="+", choices=["dense", "sparse"],
                        default=["dense", "sparse"])  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, help="instead of each method's own")
    parser.add_argument("--size-ratios", nargs="+", type=float, default=[0.2], help="of sketches")
    parser.add_argument("--update-scale", type=float, default=4.0,
                        help="of adaptive methods' sparse entries")  # fmt: skip
    parser.add_argument("-np", type=int, default=2, help="ranks")
    parser.add_argument("--runs", type=tables.path, default="/tmp/word_runs",
                        help="folder of all runs")  # fmt: skip
    return parser.parse_args()


def rates_of(method: Method, options: argparse.Namespace) -> tuple[float, ...]:
    return method.rates if options.scale == "short" else (method.paper_rate,)


def run(
    options: argparse.Namespace, name: str, exchange: str, lr: float, size_ratio: float | None
) -> dict[str, Any]:
    """Return a run's result, after running it if it is not complete."""
    names, settings = description(options, name, exchange, lr, size_ratio)
    files = [f"configs/{each}.py" for each in names]
    texts = {path: str(value) for path, value in settings.items()}
    suffix = f".lr-{lr:g}" + (f".size-{size_ratio:g}" if size_ratio else "")
    _, result = runs.trained(files, texts, options.np, suffix, options.runs)
    return result | {"lr": lr}


def description(
    options: argparse.Namespace, name: str, exchange: str, lr: float, size_ratio: float | None
) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the config files, and the settings that override them."""
    method, is_short = METHODS[name], options.scale == "short"
    names = ["wikitext/lstm_small" if is_short else "wikitext/lstm"]
    settings: dict[str, Any] = {"dataset.root": options.data.resolve()}
    if options.softmax == "sampled":
        names.append("softmax/sampled")
    names += method.files
    if is_short:
        names.append("optim/warmup_cooldown")
        settings |= {"train.polyak_decay": "none", "train.scheduler.cooldown_fraction": 0.5,
                     "train.num_epochs": 1}  # fmt: skip
        settings["data.samples_per_epoch"] = options.np * BATCH_SIZE * options.steps
    if exchange == "sparse":
        names += SPARSE
        if method.clip == 1.0:
            settings["dgc.update_scale"] = options.update_scale
    if name == MOMENTUM and options.softmax == "full":
        names[names.index("optim/momentum")] = "optim/sgd"  # momentum correction is SGD's
    if size_ratio:
        settings["train.optimizer.size_ratio"] = size_ratio
    return names, settings | {"train.optimizer.lr": lr, "train.clip_norm": method.clip}


def summarize(
    name: str, exchange: str, size_ratio: float | None, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a row: the rate that is best on the validation text."""
    valid = {r["lr"]: r["metrics"]["perplexity/valid"]["best"] for r in results}
    best = min(results, key=lambda r: valid[r["lr"]])
    kept = {k: v for k, v in best["state_bytes"].items() if k not in ("parameters", "buffers")}
    return {
        "method": name,
        "exchange": exchange,
        "size_ratio": size_ratio,
        "lr": best["lr"],
        "valid_perplexity": valid[best["lr"]],
        "test_perplexity": best["metrics"]["perplexity/test"]["at_best"],
        "valid_perplexity_of_rate": valid,
        "optimizer_bytes": kept["optimizer"],
        "kept_bytes": sum(kept.values()),
        "num_parameters": best["num_parameters"],
        "payload_bytes_per_step": best["payload_bytes_per_step"],
        "dense_bytes_per_step": best["dense_bytes_per_step"],
        "seconds_per_step": best["seconds_per_step"],
        "steps": best["steps"],
        "world_size": best["world_size"],
        "hardware": best["hardware"],
        "versions": best["versions"],
        "config": best["config"],
    }


def add_gaps(rows: list[dict[str, Any]]) -> None:
    """Add to each row how far its perplexity is above its rival's, with the same exchange."""
    plain = {(row["method"], row["exchange"]): row for row in rows}
    for row in rows:
        rival = plain.get((METHODS[row["method"]].rival, row["exchange"]))
        if rival is not None:
            row["gap"] = row["test_perplexity"] / rival["test_perplexity"] - 1


COLUMNS: tables.Columns = {
    "method": lambda row: (
        row["method"] + (f", sketches of {row['size_ratio']:g}" if row["size_ratio"] else "")
    ),
    "exchange": lambda row: row["exchange"],
    "test perplexity": lambda row: f"{row['test_perplexity']:.2f}",
    "to the uncompressed": lambda row: f"{100 * row['gap']:+.1f}%" if "gap" in row else "",
    "rate": lambda row: f"{row['lr']:g}",
    "optimizer state, bytes": lambda row: f"{row['optimizer_bytes']:,}",
    "all that is kept": lambda row: f"{row['kept_bytes']:,}",
    "sent a step": lambda row: f"{row['payload_bytes_per_step']:,.0f}",
    "ms a step": lambda row: f"{1e3 * row['seconds_per_step']['total']:.0f}",
    "of it the optimizer": lambda row: f"{1e3 * row['seconds_per_step']['optimizer']:.1f}",
}


if __name__ == "__main__":
    main()
