"""Tensors that one call can take together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


def by_kind(tensors: Mapping[Key, Tensor]) -> list[dict[Key, Tensor]]:
    """Part tensors by device and dtype; each part keeps their order."""
    parts: dict[tuple[torch.device, torch.dtype], dict[Key, Tensor]] = {}
    for key, tensor in tensors.items():
        parts.setdefault((tensor.device, tensor.dtype), {})[key] = tensor
    return list(parts.values())
