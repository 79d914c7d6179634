"""Times of operations that take turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.contenders import milliseconds

Times = dict[str, list[float]]  # operation -> milliseconds in each round
COPY = "copy of the tensor"  # the operation that others are compared with


def take_turns(
    work: Mapping[str, Callable[[], Any]],
    num_rounds: int,
    device: torch.device,
    prepare: Mapping[str, Callable[[], Any]] | None = None,
) -> Times:
    """Call every operation once in each round; return the times of the rounds but the first two.

    Args: prepare: operation -> what is called before it, and not timed.
    """
    times: Times = {name: [] for name in work}
    for number in range(-2, num_rounds):
        for name, operation in work.items():
            if prepare and name in prepare:
                prepare[name]()
            time = milliseconds(operation, device)
            if number >= 0:  # the first rounds make state and warm up
                times[name].append(time)
    return times


def ratio(times: Times, above: str, below: str) -> float:
    """Return the median over rounds of the ratio of two operations' times."""
    pairs = zip(times[above], times[below], strict=True)
    return statistics.median(a / b for a, b in pairs)
