"""The averaging of statistics over all workers, at the end of those steps in which it is due."""

from __future__ import annotations

from dgc.comm.interface import Handle
from dgc.exchange.route import Route
from dgc.exchange.step import Step


class Sharing:
    """The collectives that average the statistics whose turn it is; there may be none."""

    def __init__(self, route: Route, step: Step) -> None:
        """Start them."""
        statistics = step.kept.statistics
        self._names = statistics.due(step.kept.compensation.num_steps)
        self._route, self._step = route, step
        self._handles: list[Handle] = []
        for flat in statistics.pack(self._names) if self._names else ():
            step.stats.statistics_bytes += flat.nbytes
            name = f"{route.scope}.statistics.{len(self._handles)}"
            self._handles.append(route.everyone.all_reduce_async(flat, name))

    def finish(self, is_bad: bool) -> None:
        """Wait, and let the means replace this worker's statistics unless the step is bad."""
        if not self._names:
            return
        with self._step.stats.timed("wait"):
            size = self._route.everyone.world_size
            means = [handle.wait().div_(size) for handle in self._handles]
        if not is_bad:
            self._step.kept.statistics.unpack(self._names, means)
