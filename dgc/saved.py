"""Whether a person who saves what all ranks share also saves what this one alone has."""

from __future__ import annotations

import logging

from dgc.exchange import Exchange

_log = logging.getLogger(__name__)


class Saved:
    """What has been asked for since the last step. rank: the one that tells of it is 0."""

    def __init__(self, rank: int) -> None:
        self._is_told = rank > 0
        self.is_shared_saved = self.is_worker_saved = False

    def tell(self, exchange: Exchange) -> None:
        """Say, once, that `state_dict` alone was taken between two steps, if that loses anything."""
        is_half = self.is_shared_saved and not self.is_worker_saved
        self.is_shared_saved = self.is_worker_saved = False
        if is_half and not self._is_told and any(exchange.state_bytes().values()):
            self._is_told = True
            _log.warning(
                "state_dict() was taken without worker_state_dict(): a run that is taken up from "
                "it begins with residuals, velocities and workers' statistics of 0. Save "
                "worker_state_dict() too, on every rank its own"
            )
