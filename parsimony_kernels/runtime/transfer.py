"""Few numbers between a device and the host: down in one copy that can be awaited later, up in one.

Both copies go by pinned memory, so that neither keeps the host from launching. Between CPU tensors
nothing is copied.
"""

from __future__ import annotations

import ctypes
import functools

import numpy
import torch
from torch import Tensor


class Download:
    """A tensor on its way to the host. The host has not waited for the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.device.type != "cpu":
            self._host, self._event = _start_copy(tensor)

    def has_come(self) -> bool:
        """Tell whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host


def _start_copy(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    with torch.cuda.device(tensor.device):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; whoever uses it on the device's current stream finds it."""
    if device.type == "cpu":
        return host
    # The allocator of pinned memory gives it to nobody else before the copy is made.
    pinned = torch.empty_like(host, pin_memory=True)
    if type(pinned) is Tensor:
        pinned.numpy()[...] = host.numpy()  # torch's copy_ wakes all threads for 32 kB
    else:
        pinned.copy_(host)
    return pinned.to(device, non_blocking=True)


def upload_bytes(*parts: ctypes.Array | bytes, device: torch.device) -> Tensor:
    """Return structures, one after another, on a device, (bytes,) uint8."""
    joined = numpy.frombuffer(bytearray().join(parts), numpy.uint8)
    return upload(torch.from_numpy(joined), device)


def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers, (n,) int64, which are made once and kept."""
    # Tensors of torch's modes, such as fake ones, must not be met outside of them.
    is_in_mode = torch._C._len_torch_dispatch_stack() > 0
    return _on_device.__wrapped__(numbers, device) if is_in_mode else _on_device(numbers, device)


@functools.lru_cache(maxsize=1024)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
