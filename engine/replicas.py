"""Keep the ranks' replicas of the model equal: check them, average their batch statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from engine import report
from engine.interfaces import Collectives

_REMEDY = (
    "Each rank's forward pass sees other samples, so what it writes into a parameter makes the "
    "ranks' models differ. Let it compute from the parameter without writing it: of nn.Embedding, "
    "nn.EmbeddingBag and their functions leave out max_norm, and bound the rows that were looked "
    "up instead"
)


class ReplicaError(RuntimeError):
    """The parameters of the ranks differ, or soon would."""


@contextmanager
def refuse_writes(model: nn.Module) -> Iterator[None]:
    """Refuse a forward pass of the model, in the block, that writes or replaces a parameter.

    Every in-place operation is seen, except those on `parameter.data`. Two kinds of parameters are
    not watched: lazy ones, which get their first values in forward, and those of recurrent layers,
    which forward may move to other memory (flatten_parameters).
    Raises: ReplicaError with the parameter's name.
    """
    recurrent = (module for module in model.modules() if isinstance(module, nn.RNNBase))
    moved = {id(p) for module in recurrent for p in module.parameters()}
    parameters = dict(model.named_parameters())
    watched = {n: p for n, p in parameters.items() if not is_lazy(p) and id(p) not in moved}
    before = {name: p._version for name, p in watched.items()}
    yield
    now = dict(model.named_parameters())
    for name, version in before.items():
        if now.get(name) is not parameters[name] or now[name]._version != version:
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ReplicaError(
                f"the parameter {name} of {type(owner).__name__} is written by the model's forward "
                f"pass. {_REMEDY}, or train on one rank"
            )


def agreed_hash(model: nn.Module, comm: Collectives, after: str) -> str:
    """Return the hash of the parameters, which must be the same on all ranks. A collective.

    Args:   after: says in the message when this was, e.g. "epoch 3".
    Raises: ReplicaError, on every rank, if the ranks' parameters differ.
    """
    everyone = comm.all_gather_object(report.hash_tensors(model.named_parameters()))
    for rank, theirs in enumerate(everyone):
        bad = [name for name in theirs if theirs[name] != everyone[0][name]]
        if bad:
            raise ReplicaError(
                f"replicas differ after {after}: ranks 0 and {rank} disagree on {len(bad)} "
                f"parameters, the first is {bad[0]}. Does the model's forward write it, through "
                f"its .data? {_REMEDY}. If it does not, restart from the last checkpoint, and "
                f"report this"
            )
    return report.hash_all(everyone[0])


def average_batch_statistics(model: nn.Module, comm: Collectives) -> None:
    """Give every rank the mean of the ranks' batch statistics. A collective.

    The other buffers of a model are taken to be constants, equal on all ranks.
    """
    statistics = batch_statistics(model).values()
    if statistics:
        flat = torch.cat([buffer.double() for buffer in statistics])
        flat = comm.all_reduce_async(flat, "buffers").wait() / comm.world_size
        parts = flat.split([buffer.numel() for buffer in statistics])
        for buffer, mean in zip(statistics, parts, strict=True):
            buffer.copy_(mean)


def batch_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of normalization layers, by name."""
    return {
        f"{prefix}.{name}".lstrip("."): getattr(module, name)
        for prefix, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for name in ("running_mean", "running_var")
    }
