"""What a DistributedOptimizer is as a torch Optimizer, and what can be looked at on it.

Owns: groups and state, which are the inner optimizer's; hooks; that it cannot be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

from torch.optim import Optimizer

from dgc.exchange.exchange import Exchange
from dgc.wire.buckets import Bucket, explain
from dgc.worker.residual import Compensation
from dgc.worker.stats import StepStats

_HOOKS = [
    f"_optimizer_{call}_{when}_hooks"
    for call in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
]


class View(Optimizer):
    """The inner optimizer's groups and state, and what the exchange keeps and does."""

    inner: Optimizer
    _exchange: Exchange

    def __init__(self, inner: Optimizer) -> None:
        # Optimizer.__init__ would build parameter groups of its own; we need only its hooks.
        self.inner = inner
        for name in _HOOKS:
            setattr(self, name, OrderedDict())

    # Schedulers, scalers and people look for these on any optimizer; they are the inner one's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    # ---- hooks, as Optimizer has them; global hooks run when the inner optimizer steps ----

    def _with_hooks(self, step: Callable[..., Any], *args: Any) -> Any:
        args, kwargs = (self, *args), {}
        for hook in self._optimizer_step_pre_hooks.values():
            changed = hook(self, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        result = step(*args[1:], **kwargs)
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, args, kwargs)
        return result

    def _hooked_state(self, call: str, when: str, *state: dict[str, Any]) -> Any:
        """Run hooks of `state_dict` or `load_state_dict`; return the state as they leave it."""
        for hook in getattr(self, f"_optimizer_{call}_{when}_hooks").values():
            changed = hook(self, *state)
            state = (changed,) if changed is not None and state else state
        return state[0] if state else None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a DistributedOptimizer cannot be copied or pickled, nor can what holds one, such as a "
            "scheduler: its hooks are on the parameters of this process. Keep state_dict() and "
            "worker_state_dict(), and load them into one that is made anew"
        )

    # ---- what it is doing ----

    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: `residual`, `velocity`, `statistics`."""
        return self._exchange.kept.num_bytes()

    @property
    def buckets(self) -> list[Bucket]:
        """What leaves together, in order; a bucket says whether it is sparse."""
        return self._exchange.buckets

    def explain(self) -> str:
        """Return a table of what leaves by which protocol, and of what the cost model says."""
        return explain(self.buckets, self._exchange.route.group.world_size)

    @property
    def stats(self) -> StepStats:
        """What this rank sent in the last step, and where the time went."""
        return self._exchange.stats

    @property
    def compensation(self) -> Compensation:
        """This rank's velocities and residuals."""
        return self._exchange.kept.compensation
