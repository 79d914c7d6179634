"""Copies of a checkpoint's content in host memory, to be written while training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

_UNCHANGING = (bool, int, float, complex, str, bytes, type(None))


def on_host(content: Any) -> Any:
    """Return a copy of nested containers, tensors and plain values, which nothing else changes.

    Tensors that share memory do so in the copy too, so that a file of it holds it once, and has the
    same bytes as one of the content itself.
    """
    return _copy(content, {})


def _copy(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, _UNCHANGING):
        return value
    if isinstance(value, Tensor):
        copied = _copy_tensor(value.detach(), storages).requires_grad_(value.requires_grad)
        is_parameter = isinstance(value, nn.Parameter)
        return nn.Parameter(copied, value.requires_grad) if is_parameter else copied
    if isinstance(value, dict):
        copied = type(value)({key: _copy(item, storages) for key, item in value.items()})
        if type(value) is not dict:  # such as a state_dict's `_metadata`
            vars(copied).update(copy.deepcopy(vars(value)))
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copy(item, storages) for item in value)
    return copy.deepcopy(value)


def _copy_tensor(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    if tensor.layout is not torch.strided:  # the momentum of row-sparse gradients
        return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in storages:
        storages[key] = storage.cpu() if storage.device.type != "cpu" else storage.clone()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
