"""The names of a checkpoint's files, and which rank reads or removes which."""

from __future__ import annotations

import re

_PART = re.compile(r"step-\d+\.(?:shared|rank-(\d+)-of-(\d+))\.pt(?:\.tmp)?", re.ASCII)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def shared_name(step: int) -> str:
    """Return the file of what all ranks have in common."""
    return f"{step_name(step)}.shared.pt"


def part_name(step: int, rank: int, world_size: int) -> str:
    """Return the file of what a rank had of its own, of so many."""
    return f"{step_name(step)}.rank-{rank:04d}-of-{world_size:04d}.pt"


def assign(seen: list[list[bool]]) -> list[int]:
    """Return by which rank each part is read, given which parts each rank sees.

    Of those that see a part, the one that has fewest so far; where none does, the rank that will
    say that it is missing.
    """
    num_read = [0] * len(seen)
    readers = []
    for part in range(len(seen[0])):
        ranks = [rank for rank, parts in enumerate(seen) if parts[part]] or [part % len(seen)]
        reader = min(ranks, key=lambda rank: (num_read[rank], rank))
        num_read[reader] += 1
        readers.append(reader)
    return readers


def may_remove(name: str, rank: int, world_size: int) -> bool:
    """Tell whether a rank removes a file when no manifest names it any more.

    Each rank its own; those of a job with more or fewer ranks, which may lie on any host, all do.
    """
    if (found := _PART.fullmatch(name)) is None:
        return False
    if found[1] is None:
        return rank == 0
    return int(found[2]) != world_size or int(found[1]) == rank


def is_later(name: str, step: int) -> bool:
    """Tell whether a manifest is of a later step."""
    found = re.fullmatch(r"step-(\d+)\.json", name, re.ASCII)
    return found is not None and int(found[1]) > step
