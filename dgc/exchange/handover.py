"""From the workers of one job to those of another: what was kept is added up and divided anew.

Workers may be more or fewer than they were, or placed otherwise. A step applies the sum of what
workers send, divided by their number; so what P workers have not sent is worth the sum of their
residuals over P. Each worker that comes gets just that, computed in float64 and rounded once: the
sum over their number is then the same. So it is with velocities, as momentum correction is linear,
and with statistics, of which the mean counts. In two levels a residual is that of an island's sum,
and gets as many times that as the island has ranks.

Source: none that we know of; DeepSpeed's 1-bit optimizers begin with errors of 0 when loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dgc.exchange.kept import Kept
from dgc.exchange.route import Route
from dgc.selection.thresholds import merged_thresholds
from dgc.worker.elements import TensorSpec
from dgc.worker.storage import KINDS, decoded

_Key = tuple[str, ...]  # of a sum: (kind, tensor) or ("statistics", tensor, part)


def take_over(
    kept: Kept,
    route: Route,
    specs: Mapping[str, TensorSpec],
    states: Iterable[tuple[int, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Let this worker go on with its share of what the workers of another job kept. A collective.

    states: (number of the worker, what its `Exchange.state_dict` returned), of those workers that
        this rank speaks for; over all ranks each worker once.
    Returns: the rest of the state of worker 0: the order of tensors, and which travel as rows.
    Raises: ValueError, on all ranks, for states of other tensors than those here, and for workers
        that are missing or come twice.
    """
    sums, facts, problem = _Sums(kept, specs), {}, None
    try:
        for worker, state in states:
            if worker in facts:
                raise ValueError(f"the state of worker {worker} was given twice; allowed: once")
            facts[worker] = sums.add(state)
    except ValueError as error:
        problem = str(error)
    everyone = route.everyone.all_gather_object((facts, sorted(sums.of), problem))
    facts = _joined([theirs for theirs, _, _ in everyone], [p for _, _, p in everyone])
    first = facts[0]
    scale = route.num_slices / len(facts)
    inherited: dict[str, dict[str, Any]] = {kind: {} for kind in (*KINDS, "statistics")}
    for key in sorted(set().union(*(keys for _, keys, _ in everyone))):
        total = sums.over_all(key, route)
        if key[0] == "statistics":
            fed = [f["statistics"][key[1]] for f in facts.values() if key[1] in f["statistics"]]
            of_tensor = inherited["statistics"].setdefault(key[1], dict(fed[0]))
            of_tensor[key[2]] = total / len(fed)
        else:
            inherited[key[0]][key[1]] = _slice(total.mul_(scale), specs[key[1]], route)
    ratio = route.num_slices / first["num_slices"]
    thresholds = merged_thresholds([fact["thresholds"] for fact in facts.values()], ratio)
    kept.compensation.inherit(
        inherited["residual"], inherited["velocity"], specs, first["num_steps"], first["momentum"]
    )
    kept.statistics.load_state_dict(inherited["statistics"])
    kept.thresholds.load_state_dict(thresholds)
    return {"order": first["order"], "rows": first["rows"]}


class _Sums:
    """The sums of what some workers kept, float64, of whole tensors, flat, on the CPU."""

    def __init__(self, kept: Kept, specs: Mapping[str, TensorSpec]) -> None:
        self._kept, self._specs = kept, specs
        self.of: dict[_Key, Tensor] = {}

    def add(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Add a worker's state; return what is not added up."""
        self._check(state)
        number, num_slices = state["share"].tolist() if "share" in state else (0, 1)
        compensation = state["compensation"]
        for kind in KINDS:
            for name, buffer in compensation[kind].items():
                self._add_slice((kind, name), decoded(buffer), number, num_slices)
        others: dict[str, dict[str, Tensor]] = {}
        for name, parts in state.get("statistics", {}).items():
            means = self._kept.statistics.preconditioners[name].shared_names
            for part in means:
                values = parts[part].to(torch.float64, copy=True)
                self.of["statistics", name, part] = self._sum_of(("statistics", name, part), values)
            others[name] = {part: tensor for part, tensor in parts.items() if part not in means}
        return {
            "statistics": others,
            "thresholds": state.get("thresholds", {}),
            "num_steps": int(compensation.get("num_steps", 0)),
            "momentum": float(compensation.get("momentum", self._kept.compensation.momentum)),
            "num_slices": num_slices,
            "order": state.get("order", []),
            "rows": state.get("rows", []),
        }

    def _check(self, state: Mapping[str, Any]) -> None:
        kept, names = self._kept, self._specs.keys()
        kept.compensation.check_names(state["compensation"], names)
        kept.thresholds.check(state.get("thresholds", {}), names)
        saved = state.get("statistics", {})
        kept.statistics.check(saved, added=names - saved.keys())

    def _add_slice(self, key: _Key, values_N: Tensor, number: int, num_slices: int) -> None:
        spec = self._specs[key[1]]
        numel = -(-spec.whole // num_slices)
        if values_N.numel() != numel:
            raise ValueError(
                f"the {key[0]} of {spec.name} was saved with {values_N.numel()} elements; allowed: "
                f"{numel}, 1/{num_slices} of the tensor's {spec.whole}"
            )
        if key not in self.of:
            self.of[key] = torch.zeros(spec.whole, dtype=torch.float64)
        mine = self.of[key][number * numel : (number + 1) * numel]
        mine += values_N[: mine.numel()]

    def _sum_of(self, key: _Key, values: Tensor) -> Tensor:
        return self.of[key].add_(values) if key in self.of else values

    def over_all(self, key: _Key, route: Route) -> Tensor:
        """Return a sum over all ranks, and keep it no longer. A collective."""
        total = self.of.pop(key, None)
        if total is None and key[0] == "statistics":
            known = self._kept.statistics.preconditioners[key[1]].tensors[key[2]]
            total = torch.zeros(known.shape, dtype=torch.float64)
        elif total is None:
            total = torch.zeros(self._specs[key[1]].whole, dtype=torch.float64)
        return route.everyone.all_reduce_async(total, f"{route.scope}.handover").wait()


def _joined(facts: list[dict[int, Any]], problems: list[str | None]) -> dict[int, Any]:
    """Return the facts of all workers, in their order."""
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)
    given = sorted(worker for some in facts for worker in some)
    if not given or given != list(range(given[-1] + 1)):
        raise ValueError(
            f"states of workers {given} were given; allowed: each from 0 to the last once, "
            f"over all ranks"
        )
    joined = {worker: fact for some in facts for worker, fact in some.items()}
    return {worker: joined[worker] for worker in given}


def _slice(whole: Tensor, spec: TensorSpec, route: Route) -> Tensor:
    """Return this rank's slice (N,) of a whole tensor, padded with zeros."""
    begin = route.slice_index * spec.numel
    mine = whole[begin : begin + spec.numel]
    return torch.nn.functional.pad(mine, (0, spec.numel - mine.numel()))
