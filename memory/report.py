"""The memory report: this run by kind and by tensor, its rivals, and the largest batch of each.

It shows what a method saves of the whole memory of training, not only of optimizer state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memory import tracker as kinds
from memory.batches import largest_batch
from memory.grouping import STATE_KIND, grouped, rank
from memory.job import Contender, Job, contenders, this_run
from memory.measure import Measured
from memory.picture import draw
from memory.predict import Prediction, Predictor
from memory.rehearsal import STATE

_MEASURED_NAMES = {"optimizer": STATE_KIND, "averaged": "averaged parameters"}
NUM_TENSORS_SHOWN = 10


def predict(job: Job, contender: Contender | None = None, **options: Any) -> Prediction:
    """Return the prediction for a contender (None: the job itself); options: see Predictor."""
    return Predictor(job)(contender or this_run(job), **options)


def report(
    job: Job,
    *,
    memory_bytes: int | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    measured: Measured | None = None,
    rivals: Sequence[Contender] | None = None,
) -> dict[str, Any]:
    """Print tables of what a job takes, and would take with rivals; return it all as plain values.

    Args: memory_bytes: find the largest batches that fit in so much; None: do not.
        folder: where memory.json and memory.png are written; None: they are not.
        measured: real steps of the same job, shown beside the prediction.
        rivals: the contenders to compare with; None: those of memory.job.contenders.
    """
    predictor = Predictor(job)
    mine = predictor(this_run(job))
    say(run_table(mine, measured))
    warming = _in_warm_up(job)
    if warming is not None:
        say(f"in the first epochs, of density {warming[0]:.3g}, {warming[1]:,} at the peak")
    say(tensor_table(mine))
    others = contenders(job) if rivals is None else [this_run(job), *rivals]
    rows = [mine, *(predictor(each) for each in others[1:])]
    say(rivals_table(rows))
    largest: dict[str, Prediction | None] = {}
    if memory_bytes is not None:
        largest = {each.name: largest_batch(predictor, each, memory_bytes) for each in others}
        say(batch_table(largest, memory_bytes))
    result = {
        **_compared(rows, measured),
        "peak_in_warm_up": None if warming is None else warming[1],
        "memory_bytes": memory_bytes,
        "largest_batch": {n: None if p is None else p.batch_size for n, p in largest.items()},
        "job": _settings(job),
    }
    if folder is not None:
        _write(folder, rows, result)
    return result


def _compared(rows: Sequence[Prediction], measured: Measured | None) -> dict[str, Any]:
    """Return the predictions, the first of which is this run's, and what was measured of it."""
    predicted = {"predicted": [as_row(row) for row in rows]}
    if measured is None:
        return {**predicted, "measured": None, "peak_error": None}
    error = rows[0].peak_bytes / measured.peak_bytes - 1
    return {**predicted, "measured": dataclasses.asdict(measured), "peak_error": error}


def _write(folder: Path, rows: Sequence[Prediction], result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, folder / "memory.png")


def _in_warm_up(job: Job) -> tuple[float, int] | None:
    """Return the largest density of the warm-up and the peak with it; None without a warm-up."""
    if job.compression is None or not job.compression.density_warmup_epochs:
        return None
    epochs = range(job.compression.density_warmup_epochs)
    density = max(map(job.compression.density_at, epochs))
    return density, predict(dataclasses.replace(job, density=density)).peak_bytes


def _settings(job: Job) -> dict[str, Any]:
    names = ("batch_size", "micro_batches", "world_size", "bucket_bytes", "precision", "device",
             "density", "compression")  # fmt: skip
    return {name: _plain(getattr(job, name)) for name in names}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def as_row(row: Prediction) -> dict[str, Any]:
    """Return a prediction and its totals as plain values."""
    return {
        **dataclasses.asdict(row),
        "kept_bytes": row.kept_bytes,
        "peak_bytes": row.peak_bytes,
        "kept_bytes_per_parameter": row.kept_bytes / row.num_parameters,
        "peak_bytes_per_parameter": row.peak_bytes / row.num_parameters,
    }


# ---- tables --------------------------------------------------------------------------------------


def run_table(mine: Prediction, measured: Measured | None) -> str:
    """Return a table of this run by kind, with measured bytes beside the predicted ones."""
    found = {_MEASURED_NAMES.get(k, k): v for k, v in (measured.kept if measured else {}).items()}
    states = [kind for kind in mine.peak if kind.startswith(STATE)]
    lines = []
    for kind in sorted(mine.kept.keys() | mine.peak.keys(), key=rank):
        name = STATE_KIND if states == [kind] else kind
        kept, peak = mine.kept.get(kind, 0), mine.peak.get(kind, 0)
        lines.append(_run_line(kind, mine, kept, peak, found.get(name)))
    if len(states) > 1:
        kept, peak = (grouped(x).get(STATE_KIND, 0) for x in (mine.kept, mine.peak))
        lines.append(_run_line("all optimizer state", mine, kept, peak, found.get(STATE_KIND)))
    total = _run_line("total", mine, mine.kept_bytes, mine.peak_bytes, None)
    if measured is not None:
        error = mine.peak_bytes / measured.peak_bytes - 1
        total = [*total[:-2], "", f"{measured.peak_bytes:,} at the peak ({error:+.1%})"]
    heading = ["kind", "kept", "a parameter", "at the peak", "a parameter", "measured kept",
               "error"]  # fmt: skip
    text = (f"predicted bytes of one rank, {mine.num_parameters:,} parameters, micro-batches of "
            f"{mine.batch_size}; the peak is in {mine.phase}")  # fmt: skip
    if mine.recorded:
        text += "; shapes that depend on data are those of a real batch"
    return "\n".join([text, *_table([heading, *lines, total])])


def _run_line(name: str, mine: Prediction, kept: int, peak: int, measured: int | None) -> list[str]:
    each = [f"{size / mine.num_parameters:.3f}" for size in (kept, peak)]
    line = [name, f"{kept:,}", each[0], f"{peak:,}", each[1], "", ""]
    if measured:
        line[-2:] = f"{measured:,}", f"{kept / measured - 1:+.1%}"
    return line


def tensor_table(mine: Prediction) -> str:
    """Return a table of the tensors for which most bytes are kept."""
    order = sorted(mine.by_tensor.items(), key=lambda item: -sum(item[1].values()))
    lines = [
        [name, f"{sum(parts.values()):,}",
         ", ".join(f"{kind.removeprefix(STATE)} {size:,}" for kind, size in parts.items())]
        for name, parts in order[:NUM_TENSORS_SHOWN]
    ]  # fmt: skip
    return "\n".join(["kept, by tensor:", *_table([["tensor", "bytes", "of which"], *lines])])


def rivals_table(rows: Sequence[Prediction]) -> str:
    """Return a table of what each contender keeps and takes: in all, and by kind at the peak."""
    shown = [kinds.PARAMETERS, kinds.GRADIENTS, "residual", "velocity", "statistics", STATE_KIND,
             kinds.EXCHANGE, kinds.ACTIVATIONS, kinds.TEMPORARIES]  # fmt: skip
    heading = ["predicted", "kept MiB", "a parameter", "peak MiB", "a parameter", "of this run",
               *(f"{kind} at the peak" for kind in shown), "peak in", "note"]  # fmt: skip
    lines = [heading]
    for row in rows:
        peak = grouped(row.peak)
        lines.append(
            [row.contender, _mib(row.kept_bytes), f"{row.kept_bytes / row.num_parameters:.2f}",
             _mib(row.peak_bytes), f"{row.peak_bytes / row.num_parameters:.2f}",
             f"{row.peak_bytes / rows[0].peak_bytes:.2f}",
             *(_mib(peak.get(kind, 0)) for kind in shown), row.phase, row.note]
        )  # fmt: skip
    return "\n".join(["the same model, batch and exchange with others:", *_table(lines)])


def batch_table(largest: dict[str, Prediction | None], memory_bytes: int) -> str:
    """Return a table of the largest micro-batch of each contender."""
    lines = [["contender", "largest micro-batch", "its peak MiB"]]
    for name, found in largest.items():
        size = "none" if found is None else f"{found.batch_size:,}"
        lines.append([name, size, "" if found is None else _mib(found.peak_bytes)])
    return "\n".join([f"within {memory_bytes / 2**30:.1f} GiB:", *_table(lines)])


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first of `lines` is its heading."""
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return [rows[0], "| --- " * len(lines[0]) + "|", *rows[1:]]
