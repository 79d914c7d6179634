"""Steps that were undone on all ranks: rank 0 logs each, and too many in a row end the run."""

from __future__ import annotations

import logging

MAX_IN_A_ROW = 100

_log = logging.getLogger(__name__)


class Undone:
    """Counts how many steps in a row were undone. rank: only rank 0 logs."""

    def __init__(self, rank: int) -> None:
        self._rank, self._num_in_a_row = rank, 0

    def end_row(self) -> None:
        self._num_in_a_row = 0

    def note(self, skipped: str) -> None:
        """Raises: FloatingPointError, on all ranks alike, when there were too many."""
        self._num_in_a_row += 1
        reason = f"the gradient of {skipped} has infinite or NaN entries, or was given up there"
        if self._num_in_a_row >= MAX_IN_A_ROW:
            raise FloatingPointError(
                f"{reason}, the {MAX_IN_A_ROW}th step in a row that had to be undone; "
                f"lower the learning rate, lengthen its warm-up or clip (dgc.clip_norm)"
            )
        if self._rank == 0:
            _log.warning("step undone on all ranks: %s", reason)
