"""What is asked about: a job, and the optimizers and exchanges that could train it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import optim
from dgc import Compression
from memory.eight_bit import EightBitAdam

Task = Callable[[nn.Module, Sequence[Tensor], Any], tuple[Tensor, Tensor, Any]]
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
_CPU = torch.device("cpu")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job of which only the sizes matter.

    make_model: builds the model in the current default device, with parameters in their dtype.
    task: as engine.interfaces.Task: (model, batch, carried) -> (loss, sums, carried).
    make_batch: of a number of samples, the tensors of a real batch, on the CPU.
    batch_size: samples of a micro-batch on one rank. precision: of forward and loss, by autocast.
    optimizer: makes one of parameter groups; groups: of a model, its groups (None: one).
    compression: None for a dense all-reduce. density: the one to predict for; None: that after
    warm-up. ranks_per_node: None for one rank a node, so one level.
    is_averaged: a Polyak average of the parameters is kept.
    """

    make_model: Callable[[], nn.Module]
    task: Task
    make_batch: Callable[[int], Sequence[Tensor]]
    batch_size: int
    optimizer: MakeOptimizer
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    compression: Compression | None = None
    density: float | None = None
    micro_batches: int = 1
    world_size: int = 1
    ranks_per_node: int | None = None
    bucket_bytes: int = 16 * 2**20
    precision: str = "float32"
    device: torch.device = _CPU
    is_averaged: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward and loss run."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.precision])

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return self.groups(model) if self.groups else [{"params": list(model.parameters())}]


@dataclass(frozen=True)
class Contender:
    """An optimizer and what of its gradient is exchanged; compression None: all, densely.

    takes_rows: it takes row-sparse gradients; for one that does not, embeddings have dense ones.
    exchanges: False: torch alone, as on one GPU: no exchange, hence no buffers of one.
    """

    name: str
    optimizer: MakeOptimizer
    compression: Compression | None = None
    takes_rows: bool = True
    exchanges: bool = True


RECOMMENDED = Compression(
    density=0.001, residual_dtype="bfloat16", value_dtype="mxfp8", index_coding="elias_fano",
    update_scale=4.0, share_statistics=0.5, clip_scope="tensor",
)  # fmt: skip


def this_run(job: Job) -> Contender:
    return Contender("this run", job.optimizer, job.compression)


def contenders(job: Job) -> list[Contender]:
    """Return this run and its rivals: the same model, batch and exchange."""
    density = RECOMMENDED.density if job.compression is None else job.compression.density
    ours = dataclasses.replace(RECOMMENDED, density=density if density < 1 else 0.001)
    return [
        this_run(job),
        Contender("Adam, torch alone", _adam, takes_rows=False, exchanges=False),
        Contender("Adam", _adam, takes_rows=False),
        Contender("8-bit Adam", EightBitAdam, takes_rows=False),
        Contender("Adafactor", torch.optim.Adafactor, takes_rows=False),
        Contender("SGD, momentum 0.9", _sgd, takes_rows=False),
        Contender("DGC-SGD", _sgd, Compression(density=ours.density), takes_rows=False),
        Contender("SM3, momentum 0.9", _of(optim.SM3, momentum=0.9, beta=0.999)),
        Contender("CS-MV", _of(optim.SketchAdam)),
        Contender("CS-V", _of(optim.SketchAdam, first_moment="full")),
        Contender("CMS-RMSprop", _of(optim.SketchRMSprop)),
        Contender("recommended", factored_adam, ours),
        Contender("recommended, 8-bit residual", factored_adam,
                  dataclasses.replace(ours, residual_dtype="int8")),
    ]  # fmt: skip


def factored_adam(groups: Any) -> Optimizer:
    return optim.FactoredAdam(groups, lr=1e-3, betas=(0.0, 0.999), decoupled_weight_decay=True)


def _of(kind: Callable[..., Optimizer], **settings: Any) -> MakeOptimizer:
    return lambda groups: kind(groups, lr=1e-3, decoupled_weight_decay=True, **settings)


def _adam(groups: Any) -> Optimizer:
    return torch.optim.Adam(groups, lr=1e-3)


def _sgd(groups: Any) -> Optimizer:
    return torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
