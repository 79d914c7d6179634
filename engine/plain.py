"""Turn the values of a checkpoint into tensors and plain values, or refuse them.

A checkpoint holds nothing else, because its reader, torch.load(weights_only=True), runs no code.
"""

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
    """Return a value in the form in which torch.load(weights_only=True) will read it.

    Scalars of numpy, and instances of subclasses of numbers and texts, become the plain value that
    they equal. A container that holds none of these is returned as it is. Nothing else is
    converted, or a resumed run would continue with another value than the run before it had.
    Args:   path: the name of the value in messages.
    Raises: TypeError for a value that the reader would refuse, with the path to that value.
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
    """Return a mapping of the same type and attributes, such as a state_dict's `_metadata`."""
    new = type(mapping)(items)
    if type(mapping) is not dict:
        vars(new).update(vars(mapping))
    return new


def _as(scalar: type, value: Any) -> Any:
    """Return the plain value of an instance of a subclass.

    Asks the base class, because the subclass may define str() and the like in its own way.
    """
    if scalar is bytes:
        return bytes(memoryview(value))
    return getattr(scalar, f"__{scalar.__name__}__")(value)


def _is_readable(value: Any) -> bool:
    """Tell whether the reader accepts a value, by trying it."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever the reader raises, the value cannot be read
        return False
    return True
