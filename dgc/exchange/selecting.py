"""Which of a bucket's entries leave, given what the passes over its tensors have listed.

In the steady state all that is listed leaves, or the largest of it: that is settled for all tensors
together. A tensor that is ranked, or whose residual must be looked through again, goes by itself.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.question import Question
from dgc.exchange.step import Seen, Step
from dgc.selection.ranking import largest_indices, mark_largest, split_marked
from dgc.selection.selector import Selector, Settling
from dgc.wire.buckets import Bucket
from dgc.worker import taken
from dgc.worker.elements import TensorSpec
from dgc.worker.statistics import divide
from dgc.worker.taken import Place, Taken, TakenTogether
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Found, Report


class _Listed(NamedTuple):
    """What a pass has listed of a tensor, of which num_leaving entries leave."""

    place: Place
    found: Found
    report: Report
    selector: Selector
    num_leaving: int


def select(
    step: Step, bucket: Bucket, seen: Seen, bad: set[int]
) -> Generator[Question, Any, TakenTogether]:
    """Take the step's entries of a bucket out of the residuals; none of tensors that rest, or are
    bad. Asks where passes found too few, or more than they can list."""
    listed, by_itself, ways = [], {}, {}
    with step.stats.timed("select"):
        for number, (spec, found) in enumerate(zip(bucket.specs, seen.founds, strict=True)):
            if number in bad or found is None:
                continue
            if step.kept.compression.select_by == "preconditioned":
                by_itself[number] = _rank_divided(step.kept, spec)
                continue
            selector, report = step.kept.thresholds[spec.name], seen.reports[number]
            num_leaving = selector.num_leaving(report)
            # The bucket is another one by now if a tensor of it was found to travel as rows.
            if num_leaving is None or found.first != bucket.firsts[spec.name]:
                ways[number] = selector.settling(
                    found, report, step.kept.compensation, spec.name, seen.counts[number]
                )
            else:
                place = Place(spec.name, report.count, found.first)
                listed.append(_Listed(place, found, report, selector, num_leaving))
        together = _leaving(step.kept, listed) if listed else None
    by_itself |= yield from _settle(step, ways)
    if together is not None and not by_itself:
        return together
    return _in_order(bucket, together, by_itself)


def _rank_divided(kept: Kept, spec: TensorSpec) -> Taken:
    """Take a tensor's largest entries, as they will be divided. Waits for a GPU."""
    magnitude_N = buffers.decode(kept.compensation.residual[spec.name]).abs()
    root_N = kept.root(spec)
    if root_N is not None:
        magnitude_N = divide(magnitude_N, root_N)
    indices_K = largest_indices(magnitude_N, kept.thresholds[spec.name].plan.k)
    return kept.compensation.take_exactly(spec.name, indices_K)


# ---- together ------------------------------------------------------------------------------------


def _leaving(kept: Kept, listed: Sequence[_Listed]) -> TakenTogether:
    """Return what leaves of all that is listed; the rest is put back."""
    all_of_it = _joined(listed)
    if all(each.num_leaving == each.report.count for each in listed):
        for each in listed:
            each.selector.note(each.report, each.num_leaving, each.selector.threshold)
        return all_of_it
    is_leaving_K, least_T = mark_largest(
        all_of_it.values_K.abs(), [each.report.count for each in listed],
        [each.num_leaving for each in listed],
    )  # fmt: skip
    for each, least in zip(listed, least_T, strict=True):
        is_all = each.num_leaving == each.report.count
        each.selector.note(
            each.report, each.num_leaving, each.selector.threshold if is_all else least
        )
    leaving, rest = _parted(all_of_it, is_leaving_K, listed)
    kept.compensation.put_back_together(rest, staying=leaving)
    return leaving


def _joined(listed: Sequence[_Listed]) -> TakenTogether:
    """Join the lists, whose positions count through the bucket; sort them if need be."""
    counts = [each.report.count for each in listed]
    founds = [each.found for each in listed]
    lists = [[f.indices for f in founds], [f.values for f in founds]]
    if founds[0].velocities is not None:
        lists.append([f.velocities for f in founds])
    parts = [
        torch.cat([part[:count] for part, count in zip(each, counts, strict=True)])
        for each in lists
    ]
    if not all(found.is_sorted for found in founds):
        parts[0], order = parts[0].sort()
        parts[1:] = [part[order] for part in parts[1:]]
    return TakenTogether([each.place for each in listed], *parts, *[None] * (3 - len(parts)))


def _parted(
    entries: TakenTogether, is_leaving_K: Tensor, listed: Sequence[_Listed]
) -> tuple[TakenTogether, TakenTogether]:
    """Return the entries that are marked, and the others. Waits for no GPU, as it is known how many
    there are of each."""
    parts = []
    for chosen in split_marked(is_leaving_K, sum(each.num_leaving for each in listed)):
        rest = None if entries.velocities_K is None else entries.velocities_K[chosen]
        parts.append((entries.positions_K[chosen], entries.values_K[chosen], rest))
    leaving = [each.place._replace(count=each.num_leaving) for each in listed]
    staying = [
        p._replace(count=p.count - q.count) for p, q in zip(entries.places, leaving, strict=True)
    ]
    return TakenTogether(leaving, *parts[0]), TakenTogether(staying, *parts[1])


# ---- by themselves -------------------------------------------------------------------------------


def _settle(step: Step, ways: Mapping[int, Settling]) -> Generator[Question, Any, dict[int, Taken]]:
    """Go these ways to their ends. What passes over several tensors found is asked for together."""
    ends: dict[int, Taken] = {}
    again: dict[int, Found] = {}

    def go_on(number: int, report: Report | None) -> None:
        try:
            again[number] = ways[number].send(report)
        except StopIteration as end:
            ends[number] = end.value

    with step.stats.timed("select"):
        for number in ways:
            go_on(number, None)
    while again:
        founds, numbers = list(again.values()), list(again)
        again.clear()
        (answer,) = yield Question([buffers.join_reports(founds)])
        with step.stats.timed("select"):
            reports = buffers.split_reports(founds, answer)
            for number, report in zip(numbers, reports, strict=True):
                go_on(number, report)
    return ends


def _in_order(
    bucket: Bucket, together: TakenTogether | None, by_itself: Mapping[int, Taken]
) -> TakenTogether:
    """Join what was settled together and what was by itself, in the order of positions."""
    parts = {} if together is None else {part.places[0].name: part for part in together.split()}
    for number, entries in by_itself.items():
        name = bucket.specs[number].name
        parts[name] = entries.at(name, bucket.firsts[name])
    ordered = [parts[spec.name] for spec in bucket.specs if spec.name in parts]
    return taken.join(ordered, bucket.dtype, bucket.specs[0].device)
