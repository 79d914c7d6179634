"""What this rank's part of an exchange came to: bytes, counts, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class StepStats:
    """What this rank's part of the last exchange came to."""

    sparse_bytes: int = 0
    dense_bytes: int = 0
    num_selected: int = 0
    num_selectable: int = 0
    skipped: str | None = None
    """Why the step was undone on all ranks; None: it was not."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes handed to the collectives: messages and dense buffers, each counted once."""
        return self.sparse_bytes + self.dense_bytes

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of the block to a phase. On a GPU: of its launch, not of its run."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
