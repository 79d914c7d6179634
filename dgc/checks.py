"""What a DistributedOptimizer is given: whether it fits together, and is alike on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from dgc.comm import Comm
from dgc.elements import check_dtype


def at_least_one(micro_batches_per_step: int) -> int:
    if micro_batches_per_step < 1:
        raise ValueError(f"micro_batches_per_step is {micro_batches_per_step}; allowed: 1 or more")
    return micro_batches_per_step


def check_optimizer(optimizer: Optimizer) -> None:
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS evaluates the loss within a step, where gradients are this rank's "
                         "own; use an optimizer of one gradient a step")  # fmt: skip


def match_parameters(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Return name -> parameter for all that the optimizer steps, in the order of the names."""
    mine = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    named: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        if name in named:
            raise ValueError(f"two parameters are named {name}; names must be unique")
        if id(parameter) in mine and parameter.requires_grad and parameter.numel():
            check_dtype(name, parameter)
            named[name] = parameter
            del mine[id(parameter)]
    unnamed = [tuple(p.shape) for p in mine.values() if p.requires_grad and p.numel()]
    if unnamed:
        raise ValueError(
            f"the optimizer has parameters of shapes {unnamed} that named_parameters lacks; "
            f"give it all of the model's named_parameters()"
        )
    if not named:
        raise ValueError("the optimizer has no parameter that requires a gradient")
    return named


def check_row_sparse(names: Collection[str], named: Mapping[str, Tensor]) -> frozenset[str]:
    for name in names:
        if name not in named or named[name].dim() < 2:
            known = "a parameter of two axes or more"
            raise ValueError(f"row_sparse names {name}, which is not {known} of this optimizer")
    return frozenset(names)


def check_same_everywhere(comm: Comm, named: dict[str, Tensor], settings: tuple) -> None:
    """Refuse ranks that would wait for each other's tensors for ever."""
    mine = [(name, tuple(p.shape)) for name, p in named.items()]
    everyone = comm.all_gather_object((mine, settings))
    lists = [shapes for shapes, _ in everyone]
    for rank, (theirs, their_settings) in enumerate(everyone):
        if their_settings != everyone[0][1]:
            raise ValueError(
                f"rank 0 was given {everyone[0][1]} and rank {rank} {their_settings} "
                f"(compression, micro_batches_per_step, bucket_bytes, row_sparse); give all ranks "
                f"the same"
            )
        for here, there in zip(lists[0], theirs, strict=False):
            if here != there:
                raise ValueError(f"rank 0 has parameter {here} where rank {rank} has {there}")
        if len(theirs) != len(lists[0]):
            raise ValueError(
                f"rank 0 has {len(lists[0])} parameters and rank {rank} has {len(theirs)}"
            )
