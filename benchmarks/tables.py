"""What all scripts here do with their figures: print tables, write JSON, draw pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def path(text: str) -> Path:
    """Return the path that a word of the command line names."""
    return Path(text).expanduser()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have."""
    found = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--json", type=path, help="write the rows here")
    return found


def print_table(rows: Sequence[Row], columns: Columns) -> None:
    """Print Markdown: `columns` gives each heading the function that turns a row into text."""
    print(f"\n| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(text(row) for text in columns.values())} |", flush=True)


def write_json(rows: Sequence[Row], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's TensorBoard events: tag -> [(x, value)]."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        data, offset = path.read_bytes(), 0
        while offset < len(data):  # length (8 bytes), checksum (4), event, checksum (4)
            size = int.from_bytes(data[offset : offset + 8], "little")
            event = Event.FromString(data[offset + 12 : offset + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            offset += size + 16
    return found


def new_picture(columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its axes: a row of `columns` plots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(3.5 + 3.5 * columns, 4), sharey=True)


def save_picture(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
