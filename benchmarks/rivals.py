"""The optimizers of other libraries that ours are compared with.

    pip install --no-deps -r benchmarks/requirements.txt

Each has its authors' default settings, except for the rate. None takes row-sparse gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

MakeOptimizer = Callable[[Any, float], Optimizer]


def _from(module: str, name: str, package: str, **settings: Any) -> MakeOptimizer:
    """Return a factory that imports `module` when called; if that fails, it says what to do."""

    def make(params: Any, lr: float) -> Optimizer:
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ImportError(
                f"{name} comes from {package}, which cannot be imported ({error}); "
                "pip install --no-deps -r benchmarks/requirements.txt"
            ) from error
        return kind(params, lr=lr, **settings)

    return make


RIVALS: dict[str, MakeOptimizer] = {
    "torch-SM3": _from("SM3", "SM3", "torch-SM3"),
    "torch-SM3, momentum 0.9": _from("SM3", "SM3", "torch-SM3", momentum=0.9),
    "torch Adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr),
    "CAME": _from("pytorch_optimizer", "CAME", "pytorch-optimizer"),
    "8-bit Adam": _from("bitsandbytes.optim", "Adam8bit", "bitsandbytes"),
}
