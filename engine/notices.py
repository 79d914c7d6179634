"""What any rank wants all to know at the end of a step, for the price of one small all-reduce.

It starts when a step starts and travels beside the step's gradients, so nobody waits for it. All
ranks read the same sums after the same step, and so come to the same decision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.interfaces import Collectives, Handle


class Notices:
    """Counts that every rank gives at a step's start, and their sums over ranks at its end.

    names: of the counts, the same on all ranks.
    """

    def __init__(self, comm: Collectives, names: Sequence[str]) -> None:
        self._comm, self._names = comm, tuple(names)
        self._handle: Handle | None = None

    def start(self, **counts: int) -> None:
        """Send this rank's counts; one that is not given is 0. A collective, with `finish`."""
        if unknown := counts.keys() - set(self._names):
            raise ValueError(f"no notice is called {min(unknown)}; allowed: {self._names}")
        mine = [float(counts.get(name, 0)) for name in self._names]
        vector = torch.tensor(mine, dtype=torch.float64, device="cpu")
        self._handle = self._comm.all_reduce_async(vector, "notices")

    def finish(self) -> dict[str, int]:
        """Return the sums over ranks of what they gave to `start`."""
        assert self._handle is not None, "finish() without start()"
        sums, self._handle = self._handle.wait().tolist(), None
        return {name: int(value) for name, value in zip(self._names, sums, strict=True)}
