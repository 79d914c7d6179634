"""Which DistributedOptimizer has a parameter: one only, or its gradients would be sent twice."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgc.optimizer.hooks.intake import Intake

_holders: dict[int, tuple[weakref.ref[Any], weakref.ref[Intake]]] = {}
"""id of a parameter -> the DistributedOptimizer and its intake."""


def hold(optimizer: Any, intake: Intake, named: Mapping[str, Tensor]) -> None:
    """Note whose the parameters are from now on, until `let_go`."""
    # Hooks keep the intake alive, and with it the parameters, which have the hooks: a circle that
    # Python's collector does not see. So they go when the optimizer does.
    weakref.finalize(optimizer, intake.close).atexit = False
    entry = (weakref.ref(optimizer), weakref.ref(intake))
    _holders.update({id(parameter): entry for parameter in named.values()})


def let_go(optimizer: Any, named: Mapping[str, Tensor]) -> None:
    for parameter in named.values():
        holder, _ = _holders.get(id(parameter), (lambda: None, None))
        if holder() is optimizer:
            del _holders[id(parameter)]


def check_free(named: Mapping[str, Tensor]) -> None:
    """Refuse parameters that another exchange holds; free those of one that nobody has any more."""
    for name, parameter in named.items():
        holder, intake = (ref() for ref in _holders.get(id(parameter), (lambda: None,) * 2))
        if intake is None or not intake.takes(parameter):
            _holders.pop(id(parameter), None)
        elif holder is None:
            intake.close()
        else:
            raise ValueError(
                f"{name} is held by another DistributedOptimizer, and its gradients would be sent "
                f"twice; close() that one first (it is closed by itself only when nothing, such as "
                f"a scheduler, refers to it any more)"
            )
