"""The parts of a run, built from its description, in the order in which they need each other.

Owns: which part is told what. What a part refuses becomes a message with the setting's path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from configs import load, modules
from configs.schema import Run, Train
from dgc import Compression, DistributedOptimizer, row_sparse_names
from dgc.comm import Comm
from engine import report
from engine.filling import fill_in
from engine.interfaces import Batches, Task
from engine.loop import Trainer
from engine.meters import Sums, smaller_is_better
from engine.precision import make_grad_scaler
from engine.sampling import make_batches
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
    train = run.train
    task = build_task(run)
    splits = build_splits(run, comm)
    batches = build_batches(run, splits, comm, device)
    check_best_metric(train, task, batches)
    model = build_model(run, splits).to(device)
    averaged = None
    if train.polyak_decay is not None:  # copied here, before the model's parameters have hooks
        averaged = AveragedModel(model, multi_avg_fn=polyak(train.polyak_decay))
    grad_scaler = make_grad_scaler(train.precision, device)
    optimizer = build_part(
        "configs.train.optimizer",
        DistributedOptimizer,
        build_optimizer(train, model),
        model.named_parameters(),
        comm=comm,
        compression=compression_of(run),
        micro_batches_per_step=train.micro_batches_per_step,
        bucket_bytes=int(train.bucket_mib * 2**20),
        seed=run.seed,
        grad_scaler=grad_scaler,
        row_sparse=row_sparse_names(model),
    )
    steps_per_epoch = batches["train"].num_batches // train.micro_batches_per_step
    sums = Sums(task.num_sums, device)
    learning_rate = build_learning_rate(run, optimizer, comm, steps_per_epoch)
    state = RunState(model, optimizer, learning_rate, sums, device, averaged, grad_scaler)
    return Trainer(
        run,
        state,
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


def build_task(run: Run) -> Task:
    if run.task is not None:
        return build_part("configs.task", run.task)
    loss = build_part("configs.train.loss", run.train.loss)
    return Classification(loss, run.train.top_k)


def compression_of(run: Run) -> Compression | None:
    """Return how the run compresses; it clips as the run does, unless it says otherwise."""
    if run.dgc is None or run.dgc.clip_norm is not None:
        return run.dgc
    return dataclasses.replace(run.dgc, clip_norm=run.train.clip_norm)


def build_model(run: Run, splits: Mapping[str, Any]) -> nn.Module:
    """Build the model, its initial parameters by the run's seed."""
    torch.manual_seed(run.seed)
    facts = getattr(splits["train"], "facts", {})
    return build_part("configs.model", fill_in(run.model, facts))


def build_optimizer(train: Train, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that the exchange will hold."""
    groups = parameter_groups(train, model)
    optimizer = build_part("configs.train.optimizer", train.optimizer, groups)
    for pattern, settings in (train.param_groups or {}).items():
        for name in settings.keys() - optimizer.defaults.keys():
            allowed = ", ".join(optimizer.defaults)
            raise load.ConfigError(
                f"configs.train.param_groups: {type(optimizer).__name__} has no setting {name!r}, "
                f"given for {pattern!r}; allowed: {allowed}"
            )
    return optimizer


def parameter_groups(train: Train, model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups: those without settings of their own, then by pattern, then
    normalization layers, if they are not to decay.

    Raises: ConfigError for a pattern that no parameter matches first.
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
            raise load.ConfigError(
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


def build_splits(run: Run, comm: Comm) -> Mapping[str, Any]:
    """Build the dataset in three turns, since the first on a disk may have to download."""
    my_turn = 0 if comm.rank == 0 else 1 if comm.local_rank == 0 else 2
    for turn in range(3):
        if turn == my_turn:
            splits = build_part("configs.dataset", run.dataset)
        comm.barrier("building the dataset on the ranks that go first")
    refuse_differences(comm, facts_of(splits))
    return splits


def facts_of(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the data must be equal on all ranks, and when a run is taken up."""
    facts: dict[str, Any] = {}
    for name, split in splits.items():
        if hasattr(split, "__len__"):
            facts[f"samples to {name}"] = len(split)
        known = {"classes": getattr(split, "classes", None), **getattr(split, "facts", {})}
        for fact, value in known.items():
            if isinstance(value, (torch.Tensor, numpy.ndarray)):
                value = report.hash_tensors([(fact, torch.as_tensor(value))])[fact]
            facts[f"{fact} to {name}"] = value
    return facts


def build_batches(
    run: Run, splits: Mapping[str, Any], comm: Comm, device: torch.device
) -> dict[str, Batches]:
    """Return this rank's batches of every split. Raises: ConfigError if an epoch has no step."""
    train = run.train
    batches, importer = {}, modules.importer()
    for name, split in splits.items():
        is_training = name == "train"
        settings = {
            "batch_size": train.batch_size_per_rank if is_training
            else train.eval_batch_size_per_rank,
            "rank": comm.rank,
            "world_size": comm.world_size,
            "seed": run.seed,
            "is_training": is_training,
            "samples_per_epoch": run.data.samples_per_epoch if is_training else None,
        }  # fmt: skip
        if hasattr(split, "batches"):
            batches[name] = build_part("configs.dataset", split.batches, **settings)
        else:
            workers = run.data.num_workers_per_rank
            pinned = device.type == "cuda"
            batches[name] = make_batches(
                split, num_workers=workers, pin_memory=pinned, prepare_worker=importer, **settings
            )
    check_epoch(train, batches["train"])
    return batches


def check_epoch(train: Train, batches: Batches) -> None:
    if batches.num_batches < train.micro_batches_per_step:
        raise load.ConfigError(
            f"configs.train: a rank's share of an epoch is {batches.num_batches} batches of "
            f"{train.batch_size_per_rank}, less than one step of {train.micro_batches_per_step}; "
            f"lower configs.train.batch_size_per_rank or micro_batches_per_step, or raise "
            f"configs.data.samples_per_epoch"
        )


def check_best_metric(train: Train, task: Task, batches: Mapping[str, Batches]) -> None:
    ones = [1.0] * task.num_sums
    allowed = [name for split in batches if split != "train" for name in task.metrics(ones, split)]
    if train.best_metric not in allowed:
        raise load.ConfigError(
            f"configs.train.best_metric is {train.best_metric!r}; allowed: {', '.join(allowed)}"
        )


def refuse_differences(comm: Comm, mine: dict[str, Any]) -> None:
    everyone = comm.all_gather_object(mine)
    for rank, theirs in enumerate(everyone):
        different = load.differences(everyone[0], theirs)
        if different:
            raise SystemExit(f"rank 0 and rank {rank} differ:\n  " + "\n  ".join(different))


def build_part(path: str, make: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Build what a setting names; what it refuses becomes a message with the setting's path."""
    try:
        return make(*arguments, **settings)
    except (TypeError, ValueError, FileNotFoundError) as error:
        raise load.ConfigError(f"{path}: {error}") from error
