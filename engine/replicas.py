"""Replicas: what every rank holds alike, and what would make it differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from engine import report
from engine.interfaces import Comm

_REMEDY = (
    "Each rank's forward pass sees other samples, so what it writes into a parameter makes the "
    "ranks' models differ. Let it compute from the parameter without writing it: of nn.Embedding, "
    "nn.EmbeddingBag and their functions leave out max_norm, and bound the rows that were looked "
    "up instead"
)


class ReplicaError(RuntimeError):
    """Ranks whose parameters differ, or soon would."""


@contextmanager
def refuse_writes(model: nn.Module) -> Iterator[None]:
    """Refuse a block, which calls the model, that writes or replaces parameters of it.

    It sees every in-place operation but those on `parameter.data`. Lazy parameters get their first
    values in forward, and recurrent layers may move theirs (flatten_parameters): both are left out.
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


def agreed_hash(model: nn.Module, comm: Comm, after: str) -> str:
    """Return the parameters' hash. A collective.

    Raises: ReplicaError, on every rank, if ranks disagree; `after` says when.
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
