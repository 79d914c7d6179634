"""Build the data of a run: its splits, the facts of them that must not change, and its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import torch

from assembly.agreement import refuse_differences
from configs import modules
from configs.errors import ConfigError, build_part
from configs.schema import Run, Train
from dgc.comm import Comm
from engine import report
from engine.interfaces import Batches
from engine.sampling import make_batches


def build_splits(run: Run, comm: Comm) -> Mapping[str, Any]:
    """Build the dataset of a run on every rank. A collective.

    Rank 0 builds it first, then the first rank of every other host, then the other ranks: building
    may download files, which the later ranks then find on their disk.
    """
    my_turn = 0 if comm.rank == 0 else 1 if comm.local_rank == 0 else 2
    for turn in range(3):
        if turn == my_turn:
            splits = build_part("configs.dataset", run.dataset)
        comm.barrier("building the dataset on the ranks that go first")
    refuse_differences(comm, facts_of(splits))
    return splits


def facts_of(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of the data that must be equal on all ranks, and when a run is resumed."""
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
    """Return this rank's batches of every split.

    Raises: ConfigError if an epoch of training has not enough batches for one step.
    """
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
        raise ConfigError(
            f"configs.train: a rank's share of an epoch is {batches.num_batches} batches of "
            f"{train.batch_size_per_rank}, less than one step of {train.micro_batches_per_step}; "
            f"lower configs.train.batch_size_per_rank or micro_batches_per_step, or raise "
            f"configs.data.samples_per_epoch"
        )
