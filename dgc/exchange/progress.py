"""A bucket on its way from one collective to the next; see protocols.py for the ways."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from dgc.comm.interface import Arrived, Handle
from dgc.exchange.lanes import Lanes
from dgc.exchange.question import Question
from dgc.exchange.update import Update


class Travelling:
    """A bucket on its way: the collective, or answer, that it waits for, or what came of it."""

    def __init__(
        self, way: Generator[Handle | Question, Any, Update], lanes: Lanes, device: torch.device
    ) -> None:
        self._way, self._lanes, self._device = way, lanes, device
        self.handle: Handle | Question | None = None
        self.update: Update | None = None
        self._send(None)

    @property
    def is_asking_last(self) -> bool:
        """Whether all that it still waits for is an answer that can come with those of others."""
        handle = self.handle
        return isinstance(handle, Question) and handle.is_last and not handle.poll()

    def arrive(self) -> None:
        """Wait for what it waits for; `go_on` then takes what that brought."""
        with self._lanes.on(self._device):  # what it brings may be made here
            self.handle = Arrived(self.handle.wait())

    def go_on(self) -> None:
        """Go on with what the collective brought."""
        with self._lanes.on(self._device):
            arrived = self.handle.wait()
        self._send(arrived)

    def _send(self, arrived: Any) -> None:
        try:
            with self._lanes.on(self._device):
                self.handle = self._way.send(arrived)
                while isinstance(self.handle, Question) and self.handle.poll():
                    self.handle = self._way.send(self.handle.wait())
        except StopIteration as end:
            self.handle, self.update = None, end.value
