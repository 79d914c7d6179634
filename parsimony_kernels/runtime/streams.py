"""torch's current stream of a GPU, as a number: a tenth of what a torch.cuda.Stream costs."""

from __future__ import annotations

import torch


def raw_stream(device: torch.device) -> int:
    """Return the handle, a cudaStream_t, of the current stream of a device that is in use."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)
