"""The typed description of a run: every setting, with its type, its unit and its purpose.

A config file sets values in a tree of these classes, as `fdl.Config` of Fiddle. Where a setting is
a callable, such as an optimizer, it is a `fdl.Partial` with the callable's own settings.
`configs.load` checks the tree and builds a `Run` from it. The description holds values only:
importing this module touches neither Horovod nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fiddle as fdl
import torch

from dgc.compression import Compression


def _require(owner: object, **conditions: tuple[bool, str]) -> None:
    """Raise ValueError for the first setting whose condition is false.

    Types, and the values of a Literal, are checked by typeguard (configs.checks); ranges are
    checked here, because its messages would not say what is allowed.
    Args: conditions: name of the setting -> (whether its value is allowed, what is allowed).
    """
    for name, (holds, allowed) in conditions.items():
        if not holds:
            raise ValueError(f"{name} is {getattr(owner, name)!r}; allowed: {allowed}")


@dataclass(kw_only=True)
class Data:
    """How a rank's samples are loaded."""

    num_workers_per_rank: int = 2
    """Loader processes for each rank; with 0 the rank loads its samples itself."""
    samples_per_epoch: int | None = None
    """Samples of an epoch, over all ranks, drawn anew for each epoch; None: the whole data set.
    Useful for a first look at a large data set."""

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
    """How the model is trained, and for how long."""

    num_epochs: int
    batch_size_per_rank: int
    """Samples of one micro-batch on one rank."""
    optimizer: Callable[..., torch.optim.Optimizer]
    """Any torch optimizer, as fdl.Partial. Its lr is the rate for one micro-batch on one rank."""
    micro_batches_per_step: int = 1
    """Micro-batches whose gradients are accumulated for a step; the global batch is
    batch_size_per_rank * micro_batches_per_step * world_size."""
    eval_batch_size_per_rank: int = 256
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of forward and loss, by torch.autocast, in training and evaluation; parameters stay in
    float32. With float16 the loss is scaled, and a step whose gradients overflow is undone."""
    loss: Callable[..., torch.nn.Module] = torch.nn.CrossEntropyLoss
    """The loss of a classification. Other tasks have their own."""
    scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None
    """Any torch scheduler, as fdl.Partial; it starts when the warm-up ends. If it takes a length
    (T_max, total_iters, total_steps) and none is set, the length of the rest of the run is filled
    in. A ReduceLROnPlateau is given best_metric after each epoch."""
    schedule_lr_per: Literal["epoch", "step"] = "epoch"
    """How often the scheduler moves."""
    lr_warmup_epochs: float = 5
    """Epochs in which the rate rises linearly, step by step, from lr to its scaled value."""
    scale_lr_by_workers: bool = True
    """Multiply lr by world_size * micro_batches_per_step (Goyal et al. 2017, arXiv:1706.02677)."""
    polyak_decay: float | None = None
    """If set, an average of the parameters is evaluated: in each step, average <- polyak_decay *
    average + (1 - polyak_decay) * parameters (in the first steps the average has less weight)."""
    clip_norm: float | None = None
    """Bound of the 2-norm of the mean gradient, over all tensors; None: no clipping. In a sparse
    exchange each worker clips its own gradient instead, by dgc.clip_norm, which takes the value
    given here if it is None itself."""
    weight_decay_on_batch_norm: bool = True
    """False: the scales and shifts of normalization layers have no weight decay."""
    param_groups: Mapping[str, Mapping[str, Any]] | None = None
    """Settings of the optimizer for some parameters: pattern of their names -> settings, e.g.
    {"recurrent.*": {"second_moment": "full"}}. The first pattern that matches a name counts."""
    top_k: Sequence[int] = (1, 5)
    """The values of k for which a classification reports how often the label is among the k best
    classes."""
    best_metric: str = "acc/test_top1"
    """The checkpoint of the epoch that is best by this metric is kept for --evaluate. Of losses and
    perplexities the smallest value is best, of other metrics the largest."""
    bucket_mib: float | None = None
    """Least size of a bucket, in MiB of gradient; a bucket is sent as one message. Small buckets
    are sent earlier, large ones make fewer messages. None: a twelfth of the gradients, but at least
    16 and at most 128 MiB."""

    def __post_init__(self) -> None:
        _require(
            self,
            num_epochs=(self.num_epochs >= 1, "1 or more"),
            batch_size_per_rank=(self.batch_size_per_rank >= 1, "1 or more"),
            eval_batch_size_per_rank=(self.eval_batch_size_per_rank >= 1, "1 or more"),
            micro_batches_per_step=(self.micro_batches_per_step >= 1, "1 or more"),
            polyak_decay=(
                self.polyak_decay is None or 0 <= self.polyak_decay < 1,
                "None or from 0 to below 1",
            ),
            lr_warmup_epochs=(self.lr_warmup_epochs >= 0, "0 or more"),
            top_k=(len(self.top_k) > 0 and min(self.top_k) >= 1, "numbers of 1 or more"),
            clip_norm=(self.clip_norm is None or self.clip_norm > 0, "None or above 0"),
            bucket_mib=(self.bucket_mib is None or self.bucket_mib > 0, "None or above 0"),
        )


@dataclass(kw_only=True)
class Checkpoint:
    """How often a checkpoint is written, and how many are kept."""

    every_epochs: int = 1
    every_steps: int | None = None
    """Write one also within an epoch, after every so many steps of the run, for epochs that take
    hours; None: only at the ends of epochs."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best one."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on: takes as much memory again
    as a checkpoint has bytes."""
    on_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written, because a disk is full or fails: end the job,
    or say so and train on; the checkpoint before stays in either case."""

    def __post_init__(self) -> None:
        _require(
            self,
            every_epochs=(self.every_epochs >= 1, "1 or more"),
            every_steps=(self.every_steps is None or self.every_steps >= 1, "None or 1 or more"),
            keep=(self.keep >= 1, "1 or more"),
        )


@dataclass(kw_only=True)
class Report:
    """How often a run tells what its steps came to."""

    every_steps: int = 10
    """Write the TensorBoard events of so many steps together, each step's with its own values. To
    read a loss is to wait for the GPU, so this is how often it is waited for. A checkpoint, the end
    of an epoch, of the run, or an error write what is there."""

    def __post_init__(self) -> None:
        _require(self, every_steps=(self.every_steps >= 1, "1 or more"))


@dataclass(kw_only=True)
class Run:
    """One run. Its callables are first called when the job has started."""

    model: Callable[..., torch.nn.Module]
    """Makes the model. Arguments that it takes and that are not set, such as num_words, are filled
    in from the `facts` of the dataset, if it has them."""
    dataset: Callable[[], Mapping[str, Any]]
    """Returns {"train": ..., "valid" or "test" or both: ...}: datasets of (input, label) samples,
    or splits that make their own batches (workloads.text)."""
    train: Train
    data: Data
    checkpoint: Checkpoint
    report: Report
    task: Callable[[], Any] | None = None
    """What the model is trained for (workloads.tasks); None: classification, by train.loss and
    train.top_k."""
    dgc: Compression | None = None
    """Deep Gradient Compression; None: a dense all-reduce."""
    seed: int = 42
    """Seeds the initial parameters, the order of samples, their augmentation, and the stochastic
    rounding of the exchange."""


def default_run() -> fdl.Config[Run]:
    """Return the tree that config files start from, in which the defaults are set."""
    optimizer = fdl.Partial(torch.optim.SGD, momentum=0.9)
    return fdl.Config(
        Run,
        train=fdl.Config(Train, optimizer=optimizer),
        data=fdl.Config(Data),
        checkpoint=fdl.Config(Checkpoint),
        report=fdl.Config(Report),
    )
