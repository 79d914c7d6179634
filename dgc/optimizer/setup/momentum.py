"""Whose momentum acts before selection: torch.optim.SGD's, or the one that Compression names.

Owns: when SGD's momentum is in the correction, and that its groups never show it. They keep the
values that people give, schedulers change and checkpoints save; only while SGD itself steps do they
hold what it must not do twice: no momentum, and a weight decay that pulls as hard without one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from dgc.compression import Compression
from dgc.exchange.exchange import Exchange
from dgc.exchange.route import Route
from dgc.worker.elements import flattened

Group = dict[str, Any]
MARK = "dgc"
"""A key in the "state" of a state dict, beside the parameters' numbers, which torch ignores. It
says that the groups have SGD's own options (before it was there they had what SGD did meanwhile),
and keeps the state from being empty (see dgc.optimizer.setup.fresh_state)."""

_log = logging.getLogger(__name__)


class Momentum:
    """The momentum of one exchange, read from the optimizer's groups as each step begins.

    is_sgds: SGD's momentum is in the correction. Groups of row-sparse parameters alone keep theirs:
        rows are sent as they are.
    Raises: ValueError where a momentum would act twice or not at all, or SGD's settings do not
        allow it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        compression: Compression,
        named: Mapping[str, Tensor],
        row_sparse: Collection[str] = (),
    ) -> None:
        self._optimizer, self._compression = optimizer, compression
        self._rows = [named[name] for name in row_sparse]
        self._named = {name: p for name, p in named.items() if name not in row_sparse}
        is_followed = compression.momentum_correction and not compression.momentum
        self.is_sgds = is_followed and isinstance(optimizer, SGD)
        momentum, _ = self.now()
        if self.is_sgds and not momentum and optimizer.defaults.get("momentum"):
            _log.warning(
                "SGD was made with momentum %g and has 0 now. If that comes from a checkpoint of a "
                "compressed run by an older version: load it into the DistributedOptimizer instead",
                optimizer.defaults["momentum"],
            )

    def leave_out_rows(self, row_sparse: Collection[str]) -> None:
        """Take these to be row-sparse from now on. Raises: ValueError, as above."""
        for name in row_sparse:
            if name in self._named:
                self._rows.append(self._named.pop(name))
        self.now()

    def now(self) -> tuple[float, bool]:
        """Return momentum and Nesterov of the correction, by the groups as they are."""
        groups = corrected_groups(self._optimizer, self._rows)
        if self._compression.momentum:
            _refuse_a_second(self._optimizer, groups, self._compression.momentum)
            return self._compression.momentum, False
        return _of_sgd(groups, self._rows) if self.is_sgds else (0.0, False)

    def begin_step(self, exchange: Exchange) -> None:
        """Let the correction have the groups' momentum in the step that begins.

        Momentum buffers that a checkpoint of dense SGD brought become velocities: they are equal on
        all ranks, and so is, in the mean over ranks, what then leaves.
        """
        compensation = exchange.kept.compensation
        compensation.momentum, compensation.nesterov = self.now()
        if self.is_sgds and compensation.momentum and self._optimizer.state:
            for name, parameter in self._named.items():
                buffer = self._take_buffer(parameter)
                if buffer is not None and buffer.any():  # a buffer of zeros needs no velocity
                    compensation.start_velocity(name, _slice(buffer, exchange.route))

    def _take_buffer(self, parameter: Tensor) -> Tensor | None:
        state = self._optimizer.state
        if parameter not in state:
            return None
        buffer = state[parameter].pop("momentum_buffer", None)
        if not state[parameter]:
            del state[parameter]
        return buffer

    @contextmanager
    def in_correction(self, momentum: float) -> Iterator[None]:
        """Let SGD, within the block, leave out the momentum that the correction had in this step.

        Weight decay, which would have gone through the momentum, is weight_decay / (1 - momentum):
        the same pull in the long run.
        """
        groups = corrected_groups(self._optimizer, self._rows) if self.is_sgds else []
        own = [{k: group[k] for k in ("momentum", "nesterov", "weight_decay")} for group in groups]
        try:
            for group in groups:  # assign, do not change in place: groups may hold the same tensor
                decay = group["weight_decay"] / (1 - momentum)
                group.update(momentum=0.0, nesterov=False, weight_decay=decay)
            yield
        finally:
            for group, options in zip(groups, own, strict=True):
                group.update(options)

    # ---- checkpoints -----------------------------------------------------------------------------

    def mark(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return SGD's state dict, or one without any state, with the mark in it."""
        if self.is_sgds or not state["state"]:
            return {**state, "state": {**state["state"], MARK: {"own_options": True}}}
        return state

    def unmark(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict without the mark, its groups as SGD's own.

        The groups of our checkpoints from before the mark have momentum 0 and the decay that goes
        with it; the momentum, which they do not know, is then taken to be the one that is here.
        """
        entries = dict(state["state"])
        is_marked = entries.pop(MARK, None) is not None
        state = {**state, "state": entries}
        here = self._optimizer.param_groups
        if is_marked or not self.is_sgds or len(here) != len(state["param_groups"]):
            return state
        momentum, nesterov = self.now()
        chosen = {id(group) for group in corrected_groups(self._optimizer, self._rows)}
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(here, state["param_groups"], strict=True)
            if id(mine) in chosen
        ]
        if not momentum or not all(_is_taken_over(mine, theirs) for mine, theirs in pairs):
            return state
        _log.info("an older checkpoint: its SGD has the momentum %g that is here", momentum)
        given_back = {
            id(theirs): {
                **theirs, "momentum": momentum, "nesterov": nesterov,
                "weight_decay": _own_decay(theirs["weight_decay"], mine["weight_decay"], momentum),
            }
            for mine, theirs in pairs
        }  # fmt: skip
        groups = [given_back.get(id(group), group) for group in state["param_groups"]]
        return {**state, "param_groups": groups}


def corrected_groups(optimizer: Optimizer, row_sparse: Sequence[Tensor]) -> list[Group]:
    """Return the groups whose gradients go through the correction: rows do not."""
    groups = optimizer.param_groups
    if not row_sparse:
        return list(groups)
    ids = {id(parameter) for parameter in row_sparse}
    return [g for g in groups if not g["params"] or any(id(p) not in ids for p in g["params"])]


def holds(group: Group, parameters: Sequence[Tensor]) -> bool:
    ids = {id(parameter) for parameter in parameters}
    return any(id(parameter) in ids for parameter in group["params"])


def _refuse_a_second(optimizer: Optimizer, groups: list[Group], momentum: float) -> None:
    mine = max((g.get("momentum", 0) or g.get("betas", (0,))[0] for g in groups), default=0)
    if mine:
        raise ValueError(
            f"dgc.momentum is {momentum} and {type(optimizer).__name__} has a momentum of {mine}: "
            f"it would act twice, each gradient be averaged twice. Set the optimizer's to 0 "
            f"(betas=(0.0, ...), momentum=0; where a scheduler cycles it, OneCycleLR or CyclicLR, "
            f"give cycle_momentum=False), or leave dgc.optimizer.setup.momentum at None"
        )


def _of_sgd(groups: list[Group], row_sparse: Sequence[Tensor]) -> tuple[float, bool]:
    settings = {(group["momentum"], group["nesterov"]) for group in groups}
    if len(settings) > 1 or any(group["dampening"] for group in groups):
        raise ValueError(
            f"momentum correction needs one momentum for all parameters and no dampening; "
            f"(momentum, nesterov) here: {sorted(settings)}; or set momentum_correction=False"
        )
    momentum, nesterov = settings.pop() if settings else (0.0, False)
    if not 0 <= momentum < 1:
        raise ValueError(f"SGD's momentum is {momentum}; allowed: from 0 to below 1")
    if momentum and row_sparse and any(holds(group, row_sparse) for group in groups):
        raise ValueError(
            f"SGD's momentum of {momentum} acts in the correction, through which rows do not "
            f"go; give row-sparse parameters a group of their own, which keeps its momentum, or "
            f"set momentum_correction=False"
        )
    return float(momentum), bool(nesterov)


def _slice(buffer: Tensor, route: Route) -> Tensor:
    """Return this rank's slice (N,) of a velocity whose mean over ranks is the momentum buffer."""
    whole = buffer.to_dense() if buffer.is_sparse else buffer
    whole_N = flattened(whole.detach())
    numel = route.slice_numel(whole_N.numel())
    padding = numel * route.num_slices - whole_N.numel()
    padded = torch.nn.functional.pad(whole_N, (0, padding))
    slice_N = padded[route.slice_index * numel :][:numel]
    return slice_N * route.num_slices  # the island's ranks are summed, not averaged


def _is_taken_over(mine: Group, theirs: Group) -> bool:
    """Tell whether a group without mark may be one whose momentum our older code had taken."""
    decay = theirs["weight_decay"]
    return not theirs["momentum"] and not (decay and decay == mine["weight_decay"])


def _own_decay(scaled: Any, mine: Any, momentum: float) -> Any:
    own = scaled * (1 - momentum)
    return mine if math.isclose(own, mine, rel_tol=1e-9) else own
