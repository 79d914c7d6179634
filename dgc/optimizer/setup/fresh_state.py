"""The state that an optimizer would begin with, made before its first step.

For `horovod.torch.broadcast_optimizer_state`: it sends what each rank's state_dict names, so rank
0, which has loaded a checkpoint, and the others, which have not, must name the same; and where
there is no state it steps the optimizer on zero gradients, which in an exchange waits for ever.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, SparseAdam

_log = logging.getLogger(__name__)
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def fill_in(
    optimizer: Optimizer, parameters: Iterable[Tensor], row_sparse: Collection[Tensor] = ()
) -> None:
    """Give the parameters that have no state yet what the optimizer would make for them first.

    It has no effect on the steps that follow, to the bit. One parameter at a time is copied. An
    optimizer around another one is left as it is: its twin would step that one.
    """
    if any(isinstance(part, Optimizer) for part in vars(optimizer).values()):
        return
    rows = {id(parameter) for parameter in row_sparse}
    for parameter in parameters:
        if not optimizer.state.get(parameter):
            is_sparse = id(parameter) in rows or isinstance(optimizer, SparseAdam)
            try:
                fresh = _first_values(optimizer, parameter, is_sparse)
            except Exception as error:  # a person's own optimizer may need what is not there yet
                _log.info("%s makes no state before its first step, as Horovod's broadcast would "
                          "need it: %r", type(optimizer).__name__, error)  # fmt: skip
                return
            if fresh and not any(torch.is_tensor(v) and v.is_sparse for v in fresh.values()):
                optimizer.state[parameter] = fresh  # Horovod sends no sparse tensors


def drop_zeros(optimizer: Optimizer) -> None:
    """Drop SGD's momentum buffers that are 0 where it takes one to be more than none: dampening
    holds for all gradients but a buffer's first. Between the loading of a state and a step."""
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        for parameter in group["params"] if group["dampening"] else ():
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None and not buffer.any():
                del optimizer.state[parameter]


def _first_values(optimizer: Optimizer, parameter: Tensor, is_sparse: bool) -> dict[str, Any]:
    """Step a twin on a zero parameter with a zero gradient; return what it set its state to first.

    Not what it has after that step: some of it (NAdam's product of momenta, ASGD's rate) moves.
    """
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    stand_in = torch.zeros_like(parameter, requires_grad=True)
    stand_in.grad = torch.zeros_like(parameter)
    if is_sparse:
        stand_in.grad = stand_in.grad.to_sparse(1)
    twin = object.__new__(type(optimizer))
    twin.__dict__ = {**optimizer.__dict__, **{name: OrderedDict() for name in _HOOKS}}
    twin.__dict__.pop("step", None)  # a scheduler has put its counter in the place of the method
    twin.param_groups = [{**copy.copy(group), "params": [stand_in], "weight_decay": 0}]
    twin.state = defaultdict(_FirstValues)
    _unhooked(type(twin).step)(twin)
    state = twin.state.get(stand_in)
    if state is None:
        return {}
    first = state.first
    if "step" in first:  # the optimizer counts from 1: as before its first step
        first["step"] = first["step"] * 0
    return first


def _unhooked(step: Any) -> Any:
    """Return the step without what counts, profiles and hooks all optimizers' steps."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


class _FirstValues(dict):
    """A parameter's state that remembers what each entry was set to first."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = copy.deepcopy(value)
        super().__setitem__(key, value)

    def update(self, *others: Mapping[str, Any], **entries: Any) -> None:
        for key, value in dict(*others, **entries).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]
