"""The tables of large_vocabulary.py: its cases, its phases, and how cost grows with rows."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import tables

CASES = [(8, 512), (32, 512), (128, 512), (512, 512), (8, 8192)]  # texts of a rank, sampled words
MEBIBYTE = 2**20
PHASES = {  # phase in the tables -> phases of stats.seconds
    "forward": ["forward"],
    "backward": ["backward"],
    "exchange": ["compensate", "select", "pack", "merge"],
    "wait": ["wait"],
    "update": ["optimizer"],
}


def summaries(rows: list[tables.Row], options: argparse.Namespace) -> list[tables.Row]:
    """Return, for each number of workers and optimizer, how cost goes with rows and words."""
    many, few = options.words
    found = []
    for workers in options.workers:
        for name in options.optimizers:
            mine = [r for r in rows if (r["workers"], r["optimizer"]) == (workers, name)]

            def of(words: int, drawn_from: int, case: tuple[int, int], mine: Any = mine) -> Any:
                key = ("row-sparse", words, drawn_from, *case)
                names = ("gradients", "words", "drawn_from", "texts", "samples")
                return next(r for r in mine if tuple(r[n] for n in names) == key)

            found.append(
                {
                    "workers": workers,
                    "optimizer": name,
                    "least": of(many, many, CASES[0]),
                    "most": of(many, many, CASES[3]),
                    "same": [
                        (of(many, many, case), of(many, few, case), of(few, few, case))
                        for case in CASES
                    ],
                    "dense": next((r for r in mine if r["gradients"] == "dense"), None),
                }
            )
    return found


def _range(row: tables.Row, ratio: Any) -> str:
    """Return the least and the largest over the cases, to two digits."""
    values = [ratio(*triple) for triple in row["same"]]
    return f"{min(values):.2f} to {max(values):.2f}"


def _growth(row: tables.Row, key: str) -> str:
    return f"{row['most'][key] / row['least'][key]:.1f}"


def _dense(row: tables.Row, key: str) -> str:
    return f"{row['dense'][key] / row['least'][key]:.0f}" if row["dense"] else "-"


COLUMNS: tables.Columns = {
    "workers": lambda row: str(row["workers"]),
    "optimizer": lambda row: row["optimizer"],
    "words (texts of)": lambda row: f"{row['words']:,} ({row['drawn_from']:,})",
    "texts, samples": lambda row: f"{row['texts']}, {row['samples']}",
    "rows": lambda row: (
        f"{row['rows']:,.0f}" if row["gradients"] == "row-sparse" else f"dense: {row['rows']:,.0f}"
    ),
    "step, ms": lambda row: f"{row['step_ms']:.1f}",
    "processor": lambda row: f"{row['cpu_ms']:.1f}",
    ", ".join(PHASES): lambda row: ", ".join(f"{ms:.1f}" for ms in row["phase_ms"].values()),
    "sent": lambda row: f"{row['sent_bytes']:,.0f}",
    "kept, MiB": lambda row: f"{row['state_bytes'] / MEBIBYTE:.0f}",
    "peak, MiB": lambda row: f"{row['peak_bytes'] / MEBIBYTE:.1f}",
    "of exchange and update": lambda row: f"{row['update_peak_bytes'] / MEBIBYTE:.1f}",
}

SUMMARY: tables.Columns = {
    "workers": lambda row: str(row["workers"]),
    "optimizer": lambda row: row["optimizer"],
    "words of text ×": lambda row: _growth(row, "texts"),
    "rows ×": lambda row: _growth(row, "rows"),
    "time ×": lambda row: _growth(row, "cpu_ms"),
    "peak ×": lambda row: _growth(row, "peak_bytes"),
    "exchange and update: peak bytes a row": lambda row: (
        f"{row['most']['update_peak_bytes'] / row['most']['rows']:,.0f}"
    ),
    "sent ×": lambda row: _growth(row, "sent_bytes"),
    "texts of the same words, words × 10: time": lambda row: _range(
        row, lambda many, near, few: near["cpu_ms"] / few["cpu_ms"]
    ),
    "rows farther apart: time": lambda row: _range(
        row, lambda many, near, few: many["cpu_ms"] / near["cpu_ms"]
    ),
    "words × 10: peak": lambda row: _range(
        row, lambda many, near, few: many["peak_bytes"] / few["peak_bytes"]
    ),
    "dense / sparse: time": lambda row: _dense(row, "cpu_ms"),
    "peak": lambda row: _dense(row, "peak_bytes"),
    "sent": lambda row: _dense(row, "sent_bytes"),
}
