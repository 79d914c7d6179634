"""Which of its implementations an operation runs on.

Every folder of operations has three, which agree: reference.py (plain torch, the specification),
host.py (C++, for CPU tensors) and device.py (CUDA). "native", the default, runs C++ or CUDA, by
where the tensors are; "reference" runs plain torch on any device. `use` or the environment variable
PARSIMONY_KERNELS chooses. Nothing falls back by itself, with one exception: float64 (a parameter,
or where there is none, a gradient or a sketch) always runs plain torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

IMPLEMENTATIONS = ("native", "reference")
_PACKAGE = __name__.split(".")[0]

_chosen = os.environ.get("PARSIMONY_KERNELS", "native")


def implementation() -> str:
    """Return which implementation operations now run on: "native" or "reference"."""
    return _chosen


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run the operations within the `with` block on the implementation of that name."""
    global _chosen
    _check_implementation(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def implementing_module(
    folder: str, device_type: str, dtype: torch.dtype = torch.float32
) -> ModuleType:
    """Return the module that implements the operations of a folder (such as "step") on a device.

    It is the chosen one, but of float64 the reference.
    """
    return _module("reference" if dtype == torch.float64 else _chosen, folder, device_type)


@functools.cache
def _module(chosen: str, folder: str, device_type: str) -> ModuleType:
    _check_implementation(chosen)
    if chosen == "reference":
        return importlib.import_module(f"{_PACKAGE}.{folder}.reference")
    modules = {"cpu": "host", "cuda": "device"}
    if device_type not in modules:
        raise ValueError(
            f"no native kernels for device {device_type}; allowed: cpu, cuda. "
            f"PARSIMONY_KERNELS=reference, or {_PACKAGE}.use('reference'), runs on any"
        )
    return importlib.import_module(f"{_PACKAGE}.{folder}.{modules[device_type]}")


def _check_implementation(name: str) -> None:
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"kernel implementation {name!r}; allowed: {allowed} (PARSIMONY_KERNELS)")
