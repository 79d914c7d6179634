"""On which stream of a GPU a step's work goes: one for each device, though hooks run on several.

Autograd runs a parameter's hook on the stream on which its forward pass ran. A bucket has tensors
of several such streams, and goes on in whichever hook, or thread, notices that it can: without an
order between them its messages could be packed before a gradient has been added.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parsimony_kernels.runtime.streams import raw_stream


class Lanes:
    """The lane of each device: the stream of the step's first gradient there.

    In most programs there is one stream, and nothing is done here. Memory that another stream has
    allocated is recorded for the lane. What the lane has allocated is read on the stream on which
    `step` is called, too; its next use on the lane is in the next backward pass, which whoever
    works with several streams must order after `step`, as it reads the parameters.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._handles: dict[torch.device, int] = {}  # of these streams

    @contextmanager
    def on(self, device: torch.device, *given: Tensor | None) -> Iterator[None]:
        """Work in the block goes to the device's lane, after what the current stream has begun.

        given: tensors that were made on the current stream.
        """
        if device.type == "cpu":
            yield
            return
        if self._is_on(device):
            yield
            return
        lane = self._streams[device]
        lane.wait_stream(torch.cuda.current_stream(device))
        for tensor in given:
            if tensor is not None:
                tensor.record_stream(lane)
        with torch.cuda.stream(lane):
            yield

    def _is_on(self, device: torch.device) -> bool:
        """Tell whether the current stream is the device's lane, as it becomes if there is none."""
        here = raw_stream(device)
        if device not in self._handles:
            self._handles[device] = here
            self._streams[device] = torch.cuda.current_stream(device)
        return self._handles[device] == here

    def move_here(self) -> None:
        """Let the current streams go on after the lanes, and take their place."""
        for device, lane in self._streams.items():
            here = torch.cuda.current_stream(device)
            if here != lane:
                here.wait_stream(lane)
                self._streams[device], self._handles[device] = here, raw_stream(device)
