"""The methods that compressed_training.py compares: optimizer, exchange, and rates to try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.contenders import NO_FIRST, OURS
from benchmarks.rivals import MakeOptimizer
from dgc import Compression
from optim import Adam


@dataclass(frozen=True)
class Method:
    """An optimizer with its exchange.

    rates: task -> rates to try; those of "cifar" are for "cifar-wide", too.
    sent: settings of Compression; None: a dense all-reduce.
    """

    make: MakeOptimizer
    rates: Mapping[str, tuple[float, ...]]
    sent: Mapping[str, Any] | None = field(default_factory=dict)

    def but(self, rates: Mapping[str, tuple[float, ...]] | None = None, **settings: Any) -> Method:
        """Return the method with other settings of Compression."""
        return replace(self, sent={**(self.sent or {}), **settings}, rates=rates or self.rates)

    def grid(self, task: str) -> tuple[float, ...]:
        return self.rates[task.removesuffix("-wide")]

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return self.make(model.parameters(), lr)

    def compression(self, density: float, clip_norm: float | None) -> Compression | None:
        if self.sent is None:
            return None
        settings = {"clip_scope": "tensor", "density_warmup_epochs": 5, **self.sent}
        settings["density_warmup"] = settings.get(
            "density_warmup", warmup(density, settings["density_warmup_epochs"])
        )
        return Compression(**{"density": density, "clip_norm": clip_norm, **settings})


def warmup(density: float, num_epochs: int) -> list[float]:
    """Return the densities of DGC's paper, 25%, 6.25%, ..., but none below the final `density`."""
    return [max(density, 0.25 ** (epoch + 1)) for epoch in range(num_epochs)]


def _sgd(params: Any, lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def _plain_sgd(params: Any, lr: float) -> Optimizer:
    return torch.optim.SGD(params, lr=lr)


def _adam(params: Any, lr: float) -> Optimizer:
    return torch.optim.Adam(params, lr=lr, fused=True)


def _full(params: Any, lr: float) -> Optimizer:
    return Adam(params, lr=lr, betas=NO_FIRST)


def _sm3_sum(params: Any, lr: float) -> Optimizer:
    return OURS["SM3"](params, lr)


_ADAM = {"digits": (3e-3, 1e-2), "cifar": (3e-3, 1e-2), "words": (3e-3, 1e-2, 2e-2)}
_SGD = {"digits": (0.03, 0.1, 0.3), "cifar": (0.05, 0.15), "words": (2.5, 5.0, 10.0)}
_LATE = {"digits": (1e-3, 3e-3, 1e-2), "cifar": (1e-3, 3e-3), "words": (1e-2, 2e-2, 4e-2)}
_SUMS = {"digits": (0.01, 0.03), "cifar": (0.03,), "words": (0.1, 0.3)}
_AFTER = {"digits": (1e-3, 3e-3, 1e-2), "cifar": (3e-3,), "words": (3e-3, 1e-2)}

# Entries that are sent sparsely have four times the rate of dense ones: Compression.update_scale.
SCALED = {"update_scale": 4.0, "share_statistics": 0.5}
_ONE = {"digits": (1e-3, 3e-3), "cifar": (1e-3, 3e-3), "words": (5e-3, 1e-2)}


def late(name: str, **settings: Any) -> Method:
    return Method(OURS[name], _ONE, sent={**SCALED, **settings})


FACTORED = "FactoredAdam, beta1 = 0"
factored = late(FACTORED, residual_dtype="bfloat16")

MXFP8 = {"value_dtype": "mxfp8", "index_coding": "elias_fano"}
MXFP4 = {"value_dtype": "mxfp4", "index_coding": "elias_fano"}

METHODS: dict[str, Method] = {
    "dense Adam": Method(_adam, _ADAM, sent=None),
    "dense SGD, momentum 0.9": Method(_sgd, _SGD, sent=None),
    "DGC-SGD": Method(_sgd, _SGD),
    "after aggregation: Adam": Method(_adam, _AFTER),
    "late factored": late(FACTORED),
    "late factored, bf16 residual": factored,
    "late factored, 8-bit residual": late(FACTORED, residual_dtype="int8"),
    "late SM3, EMA": late("SM3Adam, beta1 = 0"),
    "late SM3, sums": Method(_sm3_sum, _SUMS, sent=SCALED),
    "late count-min": late("CMS, beta1 = 0"),
    "late full": Method(_full, _ONE, sent=SCALED),
}
ABLATIONS: dict[str, Method] = {
    "statistics of each worker": factored.but(share_statistics=0.0),
    "statistics shared in every step": factored.but(share_statistics=math.inf),
    "statistics shared for a tenth of the bytes": factored.but(share_statistics=0.1),
    "update_scale 1": factored.but(_LATE, update_scale=1.0),
    "update_scale 2": factored.but(update_scale=2.0),
    "update_scale 8": factored.but(update_scale=8.0),
    "early": factored.but(preconditioning="early"),
    "by preconditioned magnitude": factored.but(select_by="preconditioned"),
    "no density warm-up": factored.but(density_warmup_epochs=0),
    "global clip": factored.but(clip_scope="global"),
    "no clip": factored.but(clip_norm=None),
    "velocity 0.9": factored.but(momentum=0.9, update_scale=1.0),
    "first moment 0.9, of what arrives": Method(OURS["FactoredAdam"], _ONE, sent=factored.sent),
    "fp16 values": factored.but(value_dtype="float16"),
    "mxfp8 values": factored.but(**MXFP8),
    "mxfp4 values": factored.but(**MXFP4),
    "sparse all-reduce, mxfp8": factored.but(protocol="sparse_all_reduce", **MXFP8),
    "two levels of 2, mxfp8": factored.but(ranks_per_island=2, two_level=True, **MXFP8),
    "DGC-SGD, mxfp8": Method(_sgd, _SGD).but(**MXFP8),
    "DGC-SGD, mxfp4": Method(_sgd, _SGD).but(**MXFP4),
    "DGC-SGD, bf16 residual and velocity": Method(_sgd, _SGD).but(
        residual_dtype="bfloat16", velocity_dtype="bfloat16"
    ),
    "DGC-SGD, 8-bit residual and velocity": Method(_sgd, _SGD).but(
        residual_dtype="int8", velocity_dtype="int8"
    ),
    "DGC-SGD, no masking": Method(_sgd, _SGD).but(mask_velocity=False),
    "DGC-SGD, no velocity": Method(_plain_sgd, _SGD),
}
ALL = METHODS | ABLATIONS
