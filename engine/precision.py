"""Mixed precision: forward and loss in 16 bits where torch holds them safe; parameters in 32.

Knows torch's autocast and float16's loss scale only; who undoes an overflow is the optimizer.
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
    """Return float16's loss scale; with other precisions it does nothing and keeps nothing."""
    return GradScaler(device.type, enabled=precision == "float16")
