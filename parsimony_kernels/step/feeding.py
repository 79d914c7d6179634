"""Sketches on a GPU: what steps, or their callers, insert into them.

Rows that share a bucket are gathered: the cells that items fall into are sorted, for all sketches
that are fed together in one go, and one thread adds a cell's items in their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from parsimony_kernels.runtime.launch import THREADS
from parsimony_kernels.runtime.operands import First, Second, Table
from parsimony_kernels.step.arguments import DeviceStep, Feeding, Inserted
from parsimony_kernels.step.program import Program

# New values of cells wait until no kernel reads the old ones; those of so many bytes wait together.
MOST_WAITING_BYTES = 64 * 2**20

Sketched = tuple[DeviceStep, First, Second]


def feedings_of(work: DeviceStep, first: First, second: Second) -> list[Feeding]:
    """Return what a step inserts into its moments that are sketches."""
    rule, found = work.rule, []
    if isinstance(second, Table):
        amounts = rule.second_gain, rule.second_forgetting, 1.0
        found.append(Feeding(second, work.items, work.dtype, Inserted.SQUARE, rule, *amounts))
    if isinstance(first, Table):
        amounts = rule.first_gain, rule.first_forgetting, 1.0
        if work.is_whole:  # the whole table is scaled instead
            amounts = rule.first_gain, 0.0, rule.first_beta
        found.append(Feeding(first, work.items, work.dtype, Inserted.GRADIENT, rule, *amounts))
    return found


def together(steps: Sequence[Sketched]) -> Iterator[tuple[list[DeviceStep], list[Feeding]]]:
    """Yield steps, and what they insert, in groups for which new values may wait together."""
    works, feedings, waiting = [], [], 0
    for work, first, second in steps:
        more = feedings_of(work, first, second)
        num_bytes = 4 * sum(map(_num_fresh, more))
        if works and waiting + num_bytes > MOST_WAITING_BYTES:
            yield works, feedings
            works, feedings, waiting = [], [], 0
        works.append(work)
        feedings += more
        waiting += num_bytes
    if works:
        yield works, feedings


def feed(program: Program, feedings: Sequence[Feeding], *, is_read_again: bool = True) -> None:
    """Insert. is_read_again: whether others read the old values before `store`."""
    feedings = [each for each in feedings if each.num_entries * each.num_columns]
    if not feedings:
        return
    first_cell = first_entry = 0
    for each in feedings:
        each.first_cell, each.first_entry = first_cell, first_entry
        first_cell, first_entry = first_cell + each.num_cells, first_entry + each.num_entries
    cells = program.give(feedings, torch.int64, cells=_num_entries)
    in_order = program.give(feedings, torch.int64, sorted=_num_entries)
    order = program.give(feedings, torch.int64, order=_num_entries)
    program.add("sketch_cells", feedings, _blocks_of_entries)
    program.call(lambda: torch.sort(cells, stable=True, out=(in_order, order)))
    waiting = [each for each in feedings if is_read_again or each.forgetting]
    if waiting:
        ranks = program.give(feedings, torch.int64, ranks=_num_entries)
        program.give(waiting, torch.float32, fresh=_num_fresh)

        def rank() -> None:
            is_first = torch.ones_like(in_order, dtype=torch.bool)
            torch.ne(in_order[1:], in_order[:-1], out=is_first[1:])
            torch.cumsum(is_first, 0, out=ranks)

        program.call(rank)
    program.add("sketch_update", feedings, _tiles, is_typed=True)


def store(program: Program, feedings: Sequence[Feeding]) -> None:
    """Bring the sketches up to what was fed, where that waits."""
    program.add("sketch_store", [each for each in feedings if each.fresh], _tiles)


def _num_entries(feeding: Feeding) -> int:
    return feeding.num_entries


def _num_fresh(feeding: Feeding) -> int:
    return min(feeding.num_entries, feeding.num_cells) * feeding.num_columns


def _blocks_of_entries(feeding: Feeding) -> int:
    return -(-feeding.num_entries // THREADS)


def _tiles(feeding: Feeding) -> int:
    return feeding.tiling.num_tiles
