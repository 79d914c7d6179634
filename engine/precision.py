"""Mixed precision: forward and loss in 16 bits where torch considers it safe, parameters in 32.

Makes torch's autocast context, and the loss scale of float16. When a scaled gradient overflows, it
is the optimizer that undoes the step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.amp import GradScaler

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which forward and loss run."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def make_grad_scaler(precision: str, device: torch.device) -> GradScaler:
    """Return the loss scale for float16. For other precisions it does nothing and has no state."""
    return GradScaler(device.type, enabled=precision == "float16")
