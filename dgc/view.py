"""What can be looked at on a DistributedOptimizer; it changes nothing."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dgc.buckets import Bucket, explain
from dgc.compensate import Compensation
from dgc.exchange import Exchange
from dgc.stats import StepStats


class View(Optimizer):
    """The inner optimizer's groups and state, and what the exchange keeps and does."""

    inner: Optimizer
    _exchange: Exchange

    # What schedulers, scalers and people look for on an optimizer is the inner optimizer's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    def worker_state_bytes(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: `residual`, `velocity`, `statistics`."""
        return self._exchange.state_bytes()

    @property
    def buckets(self) -> list[Bucket]:
        """What leaves together, in order; a bucket says whether it is sparse."""
        return self._exchange.buckets

    def explain(self) -> str:
        """Return a table of what leaves by which protocol, and of what the cost model says."""
        return explain(self.buckets, self._exchange.group.world_size)

    @property
    def stats(self) -> StepStats:
        """What this rank sent in the last step, and where the time went."""
        return self._exchange.stats

    @property
    def compensation(self) -> Compensation:
        """This rank's velocities and residuals."""
        return self._exchange.compensation
