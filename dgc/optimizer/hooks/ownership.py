"""Whether a gradient's memory belongs to us alone, so that the residual may take it over."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_MINE = 3  # references: the caller's variable, this function's, getrefcount's own


def is_sole_owner(tensor: Tensor) -> bool:
    """Tell whether a dense tensor fills memory that nobody but the calling variable holds.

    Nothing is promised by torch here: where it cannot be found out, the answer is no.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or not tensor.is_contiguous() or sys.getrefcount(tensor) > _MINE:
        return False
    storage = tensor.untyped_storage()
    fills = storage.nbytes() == tensor.numel() * tensor.element_size()
    return fills and count(storage._cdata) <= 2  # the tensor's and that of `storage`
