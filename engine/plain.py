"""Tensors and plain values: all that a checkpoint may hold, since its reader runs no code."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_SCALARS = (bool, int, float, complex, str, bytes)
_TENSORS = (Tensor, nn.Parameter)
_NUMPY = (numpy.generic, numpy.ndarray)


def plain(value: Any, path: str) -> Any:
    """Return a value as torch.load(weights_only=True) will read it.

    numpy's scalars, and subclasses of numbers and texts, become the plain value that they equal;
    what holds none of them is returned as it is. Nothing else is converted: the run that reads it
    would go on with something else than the run that wrote it.
    Args:   path: what the value is called in messages.
    Raises: TypeError for what the reader would refuse, with the path to it.
    """
    kind = type(value)
    if value is None or kind in _SCALARS or (kind in _TENSORS and not vars(value)):
        return value
    if isinstance(value, _NUMPY) and value.ndim == 0 and type(value.item()) in _SCALARS:
        return value.item()
    if kind in (dict, OrderedDict, Counter):
        keys = [plain(key, f"a key of {path}") for key in value]
        items = [plain(item, _at(path, key)) for key, item in value.items()]
        same = _are(keys, value.keys()) and _are(items, value.values())
        return value if same else _like(value, dict(zip(keys, items, strict=True)))
    if kind in (list, tuple, set):
        items = [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return value if _are(items, value) else kind(items)
    for scalar in _SCALARS:
        if isinstance(value, scalar):
            return _as(scalar, value)
    if not _is_readable(value):
        raise TypeError(
            f"{path} is {str(value)[:80]!r} ({kind.__module__}.{kind.__qualname__}), which a "
            f"checkpoint cannot hold; allowed: tensors, numbers, texts, and dicts, lists, tuples "
            f"and sets of them. Keep one of these there, and convert it where it is used"
        )
    return value


def _at(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"


def _are(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(one is other for one, other in zip(new, old, strict=True))


def _like(mapping: dict, items: dict) -> dict:
    """Return a mapping of the same kind; a module's state_dict has versions as an attribute."""
    new = type(mapping)(items)
    if type(mapping) is not dict:
        vars(new).update(vars(mapping))
    return new


def _as(scalar: type, value: Any) -> Any:
    """Return the value of a subclass's instance, whatever it has made of str() and the like."""
    if scalar is bytes:
        return bytes(memoryview(value))
    return getattr(scalar, f"__{scalar.__name__}__")(value)


def _is_readable(value: Any) -> bool:
    """Ask the reader itself."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever it is, there is no reading it
        return False
    return True
