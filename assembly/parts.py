"""Build the parts of a run from its description, in the order in which they need each other.

An error of a part becomes a ConfigError that names the setting (configs.errors.build_part).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel

from assembly.data import build_batches, build_splits, facts_of
from configs import load
from configs.errors import ConfigError, build_part
from configs.schema import Run, Train
from dgc import Compression, DistributedOptimizer, row_sparse_names
from dgc.comm import Comm
from engine import report
from engine.filling import fill_in
from engine.interfaces import Batches, Task
from engine.loop import Trainer
from engine.meters import Sums, smaller_is_better
from engine.precision import make_grad_scaler
from engine.schedules import LearningRate
from engine.state import RunState, polyak
from workloads.tasks import Classification


def build_trainer(
    run: Run,
    comm: Comm,
    device: torch.device,
    folder: Path,
    flat_config: dict[str, Any],
    reporter: report.Reporter | report.SilentReporter,
) -> Trainer:
    """Build a run. A collective."""
    task = build_task(run)
    splits = build_splits(run, comm)
    batches = build_batches(run, splits, comm, device)
    check_best_metric(run.train, task, batches)
    steps_per_epoch = batches["train"].num_batches // run.train.micro_batches_per_step
    model = build_model(run, splits).to(device)
    sums = Sums(task.num_sums, device)
    return Trainer(
        run,
        build_state(run, comm, device, model, sums, steps_per_epoch),
        comm=comm,
        task=task,
        batches=batches,
        folder=folder,
        steps_per_epoch=steps_per_epoch,
        flat_config=flat_config,
        data_facts=facts_of(splits),
        config_changes=load.changes,
        reporter=reporter,
    )


def build_state(
    run: Run, comm: Comm, device: torch.device, model: nn.Module, sums: Sums, steps_per_epoch: int
) -> RunState:
    """Build what changes during the run, around its model. A collective."""
    train, averaged = run.train, None
    if train.polyak_decay is not None:  # copied here, before the model's parameters have hooks
        averaged = AveragedModel(model, multi_avg_fn=polyak(train.polyak_decay))
    grad_scaler = make_grad_scaler(train.precision, device)
    optimizer = build_optimizer(run, comm, model, grad_scaler)
    learning_rate = build_learning_rate(run, optimizer, comm, steps_per_epoch)
    return RunState(model, optimizer, learning_rate, sums, device, averaged, grad_scaler)


def build_task(run: Run) -> Task:
    if run.task is not None:
        return build_part("configs.task", run.task)
    loss = build_part("configs.train.loss", run.train.loss)
    return Classification(loss, run.train.top_k)


def build_model(run: Run, splits: Mapping[str, Any]) -> nn.Module:
    """Build the model; the run's seed gives its initial parameters."""
    torch.manual_seed(run.seed)
    facts = getattr(splits["train"], "facts", {})
    return build_part("configs.model", fill_in(run.model, facts))


def build_optimizer(
    run: Run, comm: Comm, model: nn.Module, grad_scaler: GradScaler
) -> DistributedOptimizer:
    """Build the run's optimizer, and the exchange of gradients around it. A collective."""
    return build_part(
        "configs.train.optimizer",
        DistributedOptimizer,
        build_inner_optimizer(run.train, model),
        model.named_parameters(),
        comm=comm,
        compression=compression_of(run),
        micro_batches_per_step=run.train.micro_batches_per_step,
        bucket_bytes=bucket_bytes_of(run.train),
        seed=run.seed,
        grad_scaler=grad_scaler,
        row_sparse=row_sparse_names(model),
    )


def compression_of(run: Run) -> Compression | None:
    """Return the settings of the sparse exchange; it clips by the run's clip_norm by default."""
    if run.dgc is None or run.dgc.clip_norm is not None:
        return run.dgc
    return dataclasses.replace(run.dgc, clip_norm=run.train.clip_norm)


def bucket_bytes_of(train: Train) -> int | None:
    return None if train.bucket_mib is None else int(train.bucket_mib * 2**20)


def build_inner_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the config names, without an exchange."""
    groups = parameter_groups(train, model)
    optimizer = build_part("configs.train.optimizer", train.optimizer, groups)
    for pattern, settings in (train.param_groups or {}).items():
        for name in settings.keys() - optimizer.defaults.keys():
            allowed = ", ".join(optimizer.defaults)
            raise ConfigError(
                f"configs.train.param_groups: {type(optimizer).__name__} has no setting {name!r}, "
                f"given for {pattern!r}; allowed: {allowed}"
            )
    return optimizer


def parameter_groups(train: Train, model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups that are not empty.

    First the parameters without settings of their own, then a group for each pattern of
    train.param_groups, then normalization layers, if these are to have no weight decay.
    Raises: ConfigError for a pattern that is not the first to match any parameter.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    undecayed: set[int] = set()
    if not train.weight_decay_on_batch_norm:
        normalizations = (m for m in model.modules() if isinstance(m, norms))
        undecayed = {id(p) for m in normalizations for p in m.parameters(False)}
    patterns = dict(train.param_groups or {})
    params: dict[str | None, list[nn.Parameter]] = {None: [], **{p: [] for p in patterns}, "": []}
    for name, parameter in model.named_parameters():
        matching = (pattern for pattern in patterns if fnmatchcase(name, pattern))
        params["" if id(parameter) in undecayed else next(matching, None)].append(parameter)
    for pattern in patterns:
        if not params[pattern]:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ConfigError(
                f"configs.train.param_groups: no parameter is matched first by {pattern!r}; "
                f"parameters are: {names}"
            )
    settings = {None: {}, **patterns, "": {"weight_decay": 0.0}}
    return [{"params": members, **settings[key]} for key, members in params.items() if members]


def build_learning_rate(
    run: Run, optimizer: DistributedOptimizer, comm: Comm, steps_per_epoch: int
) -> LearningRate:
    train = run.train
    workers = comm.world_size * train.micro_batches_per_step
    return build_part(
        "configs.train.scheduler",
        LearningRate,
        optimizer,
        scale=workers if train.scale_lr_by_workers else 1,
        warmup_steps=round(train.lr_warmup_epochs * steps_per_epoch),
        make_scheduler=train.scheduler,
        total_steps=train.num_epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        per=train.schedule_lr_per,
        smaller_is_better=smaller_is_better(train.best_metric),
    )


def check_best_metric(train: Train, task: Task, batches: Mapping[str, Batches]) -> None:
    """Refuse a best_metric that the task does not compute for any split that is evaluated."""
    ones = [1.0] * task.num_sums
    allowed = [name for split in batches if split != "train" for name in task.metrics(ones, split)]
    if train.best_metric not in allowed:
        raise ConfigError(
            f"configs.train.best_metric is {train.best_metric!r}; allowed: {', '.join(allowed)}"
        )
