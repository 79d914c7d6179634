"""What a DistributedOptimizer is given: whether it fits together, and is alike on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from dgc.comm.interface import Comm
from dgc.compression import Compression
from dgc.optimizer.setup.horovod_names import compressor_name
from dgc.worker.elements import check_dtype

MAKE_ANEW = (
    "close() the DistributedOptimizer and make it anew. Residuals, velocities and the workers' "
    "second moments begin at 0 then, unless what its worker_state_dict() returned is given to "
    "load_worker_state_dict() of the new one; parameters that were added begin at 0"
)


def at_least_one(micro_batches_per_step: int) -> int:
    if micro_batches_per_step < 1:
        raise ValueError(f"micro_batches_per_step is {micro_batches_per_step}; allowed: 1 or more")
    return micro_batches_per_step


def check_optimizer(optimizer: Optimizer) -> None:
    if hasattr(optimizer, "synchronize"):
        raise ValueError(
            f"{type(optimizer).__name__} is a distributed optimizer itself, and would exchange the "
            f"gradients again; give the optimizer that it was made of"
        )
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS evaluates the loss within a step, where gradients are this rank's "
                         "own; use an optimizer of one gradient a step")  # fmt: skip


def check_compression(compression: Any) -> Compression | None:
    if compression is None or isinstance(compression, Compression):
        return compression
    horovods = compressor_name(compression)
    if horovods == "NoneCompressor":
        return None
    remedy = ""
    if horovods is not None:
        remedy = (
            ". Horovod's compressors halve what a dense exchange sends; in place of "
            "hvd.Compression.fp16 take Compression(density=0.01, value_dtype='float16'), which "
            "sends a hundredth of the entries, in 16 bits"
        )
    raise TypeError(
        f"compression is {compression!r}; allowed: dgc.Compression(...), or None for a dense "
        f"exchange in float32{remedy}"
    )


def check_comm(comm: Comm | None) -> Comm:
    if comm is None:
        raise TypeError(
            "DistributedOptimizer needs comm=: HorovodComm() (from dgc.comm) in a job of "
            "horovodrun or mpirun, TorchComm() (from dgc.comm) in one of torchrun's"
        )
    return comm


def match_parameters(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[str, Tensor]:
    """Return name -> parameter for all that the optimizer steps, in the order of the names.

    None: names by group and place in it, such as "parameter.0.3".
    """
    groups = [group["params"] for group in optimizer.param_groups]
    if named_parameters is None:
        named_parameters = [
            (f"parameter.{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group)
        ]
    mine = {id(p): p for group in groups for p in group}
    named: dict[str, Tensor] = {}
    for name, parameter in _pairs(named_parameters):
        if name in named:
            raise ValueError(f"two parameters are named {name}; names must be unique")
        if id(parameter) in mine and is_lazy(parameter):
            raise ValueError(
                f"{name} is a lazy parameter without a shape yet, and what is exchanged is laid "
                f"out when the DistributedOptimizer is made; run one forward pass of the model "
                f"before, on every rank"
            )
        if id(parameter) in mine and parameter.requires_grad and parameter.numel():
            check_dtype(name, parameter)
            named[name] = parameter
            del mine[id(parameter)]
    left = [p for p in mine.values() if p.requires_grad]
    unnamed = ["lazy" if is_lazy(p) else tuple(p.shape) for p in left if is_lazy(p) or p.numel()]
    if unnamed:
        raise ValueError(
            f"the optimizer has parameters of shapes {unnamed} that named_parameters lacks; "
            f"give it all of the model's named_parameters()"
        )
    if not named:
        raise ValueError("the optimizer has no parameter that requires a gradient")
    return named


def _pairs(named_parameters: Iterable[Any]) -> list[tuple[str, Tensor]]:
    pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    pairs = list(pairs)
    for pair in pairs:
        if torch.is_tensor(pair) or len(pair) != 2 or not isinstance(pair[0], str):
            kind = "a tensor" if torch.is_tensor(pair) else repr(pair)[:80]
            raise ValueError(
                f"named_parameters has {kind}; allowed: pairs of a name and a parameter, as "
                f"model.named_parameters() gives them"
            )
    return pairs


def check_row_sparse(names: Collection[str], named: Mapping[str, Tensor]) -> frozenset[str]:
    for name in names:
        if name not in named or named[name].dim() < 2:
            known = "a parameter of two axes or more"
            raise ValueError(f"row_sparse names {name}, which is not {known} of this optimizer")
    return frozenset(names)


def check_same_everywhere(comm: Comm, named: dict[str, Tensor], settings: tuple) -> None:
    """Refuse ranks that would wait for each other's tensors for ever."""
    mine = [(name, tuple(p.shape), str(p.dtype)) for name, p in named.items()]
    everyone = comm.all_gather_object((mine, settings))
    lists = [shapes for shapes, _ in everyone]
    for rank, (theirs, their_settings) in enumerate(everyone):
        if their_settings != everyone[0][1]:
            raise ValueError(
                f"rank 0 was given {everyone[0][1]} and rank {rank} {their_settings} "
                f"(compression, micro_batches_per_step, bucket_bytes, row_sparse, whether there is "
                f"a grad_scaler); give all ranks the same"
            )
        for here, there in zip(lists[0], theirs, strict=False):
            if here != there:
                raise ValueError(f"rank 0 has parameter {here} where rank {rank} has {there}")
        if len(theirs) != len(lists[0]):
            raise ValueError(
                f"rank 0 has {len(lists[0])} parameters and rank {rank} has {len(theirs)}"
            )


def check_all_exchanged(optimizer: Optimizer, exchanged: Collection[int]) -> None:
    """Refuse gradients that this rank would apply alone; exchanged: ids of parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            is_ours = id(parameter) in exchanged or not parameter.numel()
            if parameter.grad is not None and not is_ours:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient but did not "
                    f"require one, or was not there, when the DistributedOptimizer was made; after "
                    f"unfreezing or adding parameters {MAKE_ANEW}"
                )


def refuse_capture(device: torch.device) -> None:
    """Refuse to be captured in a CUDA graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step of a DistributedOptimizer cannot be captured in a CUDA graph: the graph would "
            "replay this step's rate and thresholds, and none of its messages. Capture forward and "
            "backward of what is not exchanged, or leave the graph out"
        )
