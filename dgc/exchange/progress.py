"""A bucket on its way from one collective to the next; see protocols.py for the ways."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from dgc.comm.interface import Arrived, Handle
from dgc.exchange.update import Update


class Travelling:
    """A bucket on its way: the collective that it waits for, or what came of it."""

    def __init__(self, way: Generator[Handle, Any, Update]) -> None:
        self._way = way
        self.handle: Handle | None = None
        self.update: Update | None = None
        self._send(None)

    def arrive(self) -> None:
        """Wait for the collective; `go_on` then takes what it brought."""
        self.handle = Arrived(self.handle.wait())

    def go_on(self) -> None:
        """Go on with what the collective brought."""
        self._send(self.handle.wait())

    def _send(self, arrived: Any) -> None:
        try:
            self.handle = self._way.send(arrived)
        except StopIteration as end:
            self.handle, self.update = None, end.value
