"""The one way in which a step's changes to what a worker keeps become final, or are undone."""

from __future__ import annotations

from typing import Protocol


class Undoable(Protocol):
    """Something that a step changes, and that keeps what was there before until the step ends."""

    def end_step(self, stands: bool) -> None:
        """Make the step's changes final if it stands; else undo them, to the bit."""
