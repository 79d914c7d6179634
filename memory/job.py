"""The job whose memory is predicted, and the optimizers and exchanges to compare for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import optim
from dgc import Compression
from engine.precision import autocast
from memory.eight_bit import EightBitAdam

Task = Callable[[nn.Module, Sequence[Tensor], Any], tuple[Tensor, Tensor, Any]]
MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job, described by what its use of memory depends on.

    make_model: builds the model on the current default device, its parameters in their dtypes.
    task: see engine.interfaces.Task: (model, batch, carried) -> (loss, sums, carried).
    make_batch: number of samples -> the tensors of a real batch, on the CPU.
    batch_size: samples of a micro-batch on one rank.
    precision: of forward and loss, by autocast.
    optimizer: parameter groups -> optimizer.
    groups: model -> parameter groups; None: one group.
    compression: None: a dense all-reduce.
    density: the density to predict for; None: the one after warm-up.
    ranks_per_node: None: one rank on each node, so that the exchange has one level.
    is_averaged: whether a Polyak average of the parameters is kept.
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
    bucket_bytes: int | None = None
    precision: str = "float32"
    device: torch.device = _CPU
    is_averaged: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward and loss run."""
        return autocast(self.precision, self.device)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return self.groups(model) if self.groups else [{"params": list(model.parameters())}]


@dataclass(frozen=True)
class Contender:
    """An optimizer to compare, with the exchange of its gradients.

    compression: None: the exchange is dense.
    takes_rows: whether the optimizer takes row-sparse gradients; if not, the gradients of
        embeddings are dense.
    exchanges: False: torch alone, as on one GPU, without an exchange and its buffers.
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
    """Return this run and its rivals, for the same model and batch."""
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
