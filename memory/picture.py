"""Draw the contenders' memory at the peak as horizontal bars, divided by kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memory.grouping import ORDER, grouped
from memory.predict import Prediction


def draw(rows: Sequence[Prediction], path: Path) -> None:
    """Write a picture with a bar for each contender, whose parts are the kinds of memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    peaks = [grouped(row.peak) for row in rows]
    present = [kind for kind in ORDER if any(kind in peak for peak in peaks)]
    present += sorted({kind for peak in peaks for kind in peak} - set(ORDER))
    colours = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.38 * len(rows)))
    left = [0.0] * len(rows)
    for number, kind in enumerate(present):
        sizes = [peak.get(kind, 0) / 2**20 for peak in peaks]
        axes.barh(range(len(rows)), sizes, left=left, label=kind,
                  color=colours[number % len(colours)])  # fmt: skip
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for height, (row, end) in enumerate(zip(rows, left, strict=True)):
        text = f" {row.peak_bytes / row.num_parameters:.1f} bytes a parameter"
        axes.text(end, height, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.contender for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel(f"MiB at the peak of a step, micro-batches of {rows[0].batch_size} (predicted)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.06 - 0.8 / len(rows)), ncols=4,
                fontsize=8)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
