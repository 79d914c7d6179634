"""The typed description of a run: every setting, its type, its unit and why it is there.

A config file fills in a tree of these with Fiddle (`fdl.Config`), and `fdl.Partial`s where a
callable of torch or torchvision goes; `configs.load` checks the tree and builds a `Run` from it.
Values only: importing this touches neither Horovod nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fiddle as fdl
import torch

from dgc.compression import Compression


def _require(owner: object, **conditions: tuple[bool, str]) -> None:
    """Raise ValueError for the first setting whose condition is false, with what is allowed."""
    for name, (holds, allowed) in conditions.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(owner, name)!r}; allowed: {allowed}")


@dataclass(kw_only=True)
class Data:
    """How samples reach a rank."""

    num_workers_per_rank: int = 2
    """Loader processes beside each rank; 0 loads in the rank itself."""
    samples_per_epoch: int | None = None
    """Train on this many samples an epoch, drawn anew each time, over all ranks; None: on all.
    For a look at a large set."""

    def __post_init__(self) -> None:
        _require(
            self,
            num_workers_per_rank=(self.num_workers_per_rank >= 0, "0 or more"),
            samples_per_epoch=(
                self.samples_per_epoch is None or self.samples_per_epoch > 0,
                "None or above 0",
            ),
        )


@dataclass(kw_only=True)
class Train:
    """What is optimized, how, and for how long."""

    num_epochs: int
    batch_size_per_rank: int
    """Samples of one micro-batch on one rank."""
    optimizer: Callable[..., torch.optim.Optimizer]
    """Any torch optimizer, as fdl.Partial; its lr is that of one micro-batch on one rank."""
    micro_batches_per_step: int = 1
    """Gradients are accumulated over this many; the global batch is
    batch_size_per_rank * micro_batches_per_step * world_size."""
    eval_batch_size_per_rank: int = 256
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of forward and loss, by torch.autocast; parameters stay in float32. float16 scales the loss,
    and skips a step where it overflows. Evaluation likewise."""
    loss: Callable[..., torch.nn.Module] = torch.nn.CrossEntropyLoss
    """Of classification; other tasks have theirs."""
    scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None
    """Any torch scheduler, as fdl.Partial; it starts when the warm-up ends. A length that it asks
    for (T_max, total_iters, total_steps) and that is not set is filled in with the rest of the
    run. A ReduceLROnPlateau looks at best_metric after each epoch."""
    schedule_lr_per: Literal["epoch", "step"] = "epoch"
    """How often the scheduler moves."""
    lr_warmup_epochs: float = 5
    """The rate rises linearly, step by step, from lr to its scaled value."""
    scale_lr_by_workers: bool = True
    """Multiply lr by world_size * micro_batches_per_step (Goyal et al. 2017, arXiv:1706.02677)."""
    polyak_decay: float | None = None
    """Evaluate an average of the parameters in which, each step, the old has this weight (less in
    the first steps; torch's AveragedModel). None: no average."""
    clip_norm: float | None = None
    """Bound of the 2-norm of the mean gradient, all tensors together. In a sparse exchange each
    worker clips its own instead, as dgc.clip_norm says, which this sets if it is None. None: no
    clipping."""
    weight_decay_on_batch_norm: bool = True
    """False: the scales and shifts of normalization layers are not decayed."""
    param_groups: Mapping[str, Mapping[str, Any]] | None = None
    """Settings of the optimizer for parameters by pattern of their names, e.g.
    {"recurrent.*": {"second_moment": "full"}}; a parameter belongs to the first that matches."""
    top_k: Sequence[int] = (1, 5)
    """Accuracies reported of a classification: the label is among the k best."""
    best_metric: str = "acc/test_top1"
    """The metric whose best epoch is kept for --evaluate: of losses and perplexities the smallest,
    of others the largest."""
    bucket_mib: float = 16.0
    """MiB of float32 gradient that leave together, at least: smaller starts earlier, larger makes
    fewer messages."""

    def __post_init__(self) -> None:
        _require(
            self,
            num_epochs=(self.num_epochs >= 1, "1 or more"),
            batch_size_per_rank=(self.batch_size_per_rank >= 1, "1 or more"),
            eval_batch_size_per_rank=(self.eval_batch_size_per_rank >= 1, "1 or more"),
            micro_batches_per_step=(self.micro_batches_per_step >= 1, "1 or more"),
            precision=(
                self.precision in ("float32", "bfloat16", "float16"),
                "float32, bfloat16, float16",
            ),
            schedule_lr_per=(self.schedule_lr_per in ("epoch", "step"), "epoch, step"),
            polyak_decay=(
                self.polyak_decay is None or 0 <= self.polyak_decay < 1,
                "None or from 0 to below 1",
            ),
            lr_warmup_epochs=(self.lr_warmup_epochs >= 0, "0 or more"),
            top_k=(len(self.top_k) > 0 and min(self.top_k) >= 1, "numbers of 1 or more"),
            clip_norm=(self.clip_norm is None or self.clip_norm > 0, "None or above 0"),
            bucket_mib=(self.bucket_mib > 0, "above 0"),
        )


@dataclass(kw_only=True)
class Checkpoint:
    """How often the whole state is saved, and how much of it is kept."""

    every_epochs: int = 1
    every_steps: int | None = None
    """Also within an epoch, after so many steps; None: not. For epochs that take hours."""
    keep: int = 2
    """Checkpoints kept beside the best one."""

    def __post_init__(self) -> None:
        _require(
            self,
            every_epochs=(self.every_epochs >= 1, "1 or more"),
            every_steps=(self.every_steps is None or self.every_steps >= 1, "None or 1 or more"),
            keep=(self.keep >= 1, "1 or more"),
        )


@dataclass(kw_only=True)
class Run:
    """One run. The callables are built when the job has started, so that a config stays values."""

    model: Callable[..., torch.nn.Module]
    """Arguments that it takes and that are not set are filled in with what the dataset knows of
    itself (num_words, word_counts)."""
    dataset: Callable[[], Mapping[str, Any]]
    """Returns {"train": ..., "valid" or "test" or both: ...}: datasets of (input, label) samples,
    or splits that cut their batches themselves (workloads.text)."""
    train: Train
    data: Data
    checkpoint: Checkpoint
    task: Callable[[], Any] | None = None
    """What the model is trained for (workloads.tasks); None: classification, by train.loss and
    train.top_k."""
    dgc: Compression | None = None
    """Deep Gradient Compression; None: a dense all-reduce."""
    seed: int = 42
    """Of the initial parameters, the order of samples, their augmentation, and the selection."""


def default_run() -> fdl.Config[Run]:
    """Return the tree that config files start from: everything that has a default."""
    optimizer = fdl.Partial(torch.optim.SGD, momentum=0.9)
    return fdl.Config(
        Run,
        train=fdl.Config(Train, optimizer=optimizer),
        data=fdl.Config(Data),
        checkpoint=fdl.Config(Checkpoint),
    )
