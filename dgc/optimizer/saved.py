"""A reminder for those who save the optimizer's state but not what each worker keeps for itself."""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)


class Saved:
    """Notes what has been saved since the last step. rank: only rank 0 prints the reminder."""

    def __init__(self, rank: int) -> None:
        self._is_told = rank > 0
        self._is_half = self._is_worker_saved = False

    def note_shared(self, num_worker_bytes: int) -> None:
        """Note that `state_dict` was called, and how many bytes of the workers' are not in it."""
        self._is_half = num_worker_bytes > 0

    def note_worker(self) -> None:
        self._is_worker_saved = True

    def tell(self) -> None:
        """Say, once, that `state_dict` alone was taken since the last step."""
        is_lost = self._is_half and not self._is_worker_saved
        self._is_half = self._is_worker_saved = False
        if is_lost and not self._is_told:
            self._is_told = True
            _log.warning(
                "state_dict() was taken without worker_state_dict(): a run that is taken up from "
                "it begins with residuals, velocities and workers' statistics of 0. Save "
                "worker_state_dict() too, on every rank its own"
            )
