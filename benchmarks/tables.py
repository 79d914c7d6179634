"""What the scripts here share: a table, the same rows as JSON, runs that are done only once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def path(text: str) -> Path:
    """Return a path of the command line."""
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


def read_result(path: Path, settings: Row) -> Row | None:
    """Return the finished run that is kept at `path`, None if none is; refuse other settings."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} is of another run, {result['settings']}; name another --out")
    return result


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's TensorBoard events: tag -> [(x, value)]."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):  # length (8 bytes), checksum (4), event, checksum (4)
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            place += size + 16
    return found


def new_picture(columns: int = 1) -> tuple[Any, Any]:
    """Return a figure, and its axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(3.5 + 3.5 * columns, 4), sharey=True)


def save_picture(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
