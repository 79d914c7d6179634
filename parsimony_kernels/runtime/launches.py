"""Launches on a GPU, each of a kernel for many tensors together.

What a kernel needs of each tensor is a structure. All of them are copied to the device at once,
from pinned memory, so that nothing waits.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from ctypes import Structure
from itertools import accumulate

import numpy
import torch

from parsimony_kernels.runtime.launch import Batch, launch
from parsimony_kernels.runtime.transfer import upload

MAX_BLOCKS = 2**20  # kernels of steps stride over what is more


class Launches:
    """Launches in order on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._chunks: list[bytes | Structure] = []
        self._size = 0
        self._turns: list[tuple[str, int, int, int, int] | Callable[[], None]] = []

    def append(self, chunks: Sequence[bytes | Structure]) -> int:
        """Upload these, too. Returns their place in what is uploaded."""
        at = self._size
        self._chunks.extend(chunks)
        self._size += sum(memoryview(chunk).nbytes for chunk in chunks)
        return at

    def launch(self, kernel: str, at: int, blocks: Sequence[int]) -> None:
        """Launch for the structures that lie at a place, with so many blocks for each."""
        ends = list(accumulate(blocks))
        if ends and ends[-1]:
            ends_at = self.append((array("q", ends).tobytes(),))
            self._turns.append((kernel, at, ends_at, len(ends), ends[-1]))

    def call(self, function: Callable[[], None]) -> None:
        """Call this when the kernels before have been launched."""
        self._turns.append(function)

    def run(self) -> None:
        """Copy the structures, as they are now, to the device, and launch."""
        self._data = numpy.frombuffer(bytearray().join(self._chunks), numpy.uint8)
        self._launch()

    def _launch(self) -> None:
        if not self._turns:
            return
        uploaded = upload(torch.from_numpy(self._data), self.device)
        base = uploaded.data_ptr()
        for turn in self._turns:
            if callable(turn):
                turn()
                continue
            kernel, at, ends, count, num_blocks = turn
            batch = Batch(base + at, base + ends, count)
            launch(kernel, min(num_blocks, MAX_BLOCKS), batch, self.device)
