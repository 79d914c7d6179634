"""What Horovod's DistributedOptimizer takes by name, and what takes its place here.

Nothing here imports horovod: a value of Horovod's is recognised by where its class is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_INSTEAD = {
    "op": "gradients are averaged over ranks, which is op=hvd.Average. For a sum multiply lr by "
    "the number of ranks; Adasum has no counterpart",
    "gradient_predivide_factor": "sums are divided by the number of ranks afterwards, in float32; "
    "leave it out (1.0)",
    "num_groups": "buckets are laid out by bucket_bytes, in the order in which gradients come; "
    "leave it out (0)",
    "groups": "buckets are laid out by bucket_bytes, in the order in which gradients come; "
    "leave it out (None)",
    "sparse_as_dense": "row-sparse gradients travel as rows; for dense ones make the embedding "
    "with sparse=False",
    "process_set": "all ranks of comm take part; train the model of a process set in a job of its "
    "own",
}


def take_backward_passes(horovods: dict[str, Any], micro_batches_per_step: int) -> int:
    """Take `backward_passes_per_step` out of Horovod's arguments: our micro_batches_per_step.

    Raises: ValueError if both are given, and differ.
    """
    passes = horovods.pop("backward_passes_per_step", micro_batches_per_step)
    if micro_batches_per_step not in (1, passes):
        raise ValueError(
            f"backward_passes_per_step is {passes} and micro_batches_per_step "
            f"{micro_batches_per_step}: they are one setting; give one of them"
        )
    return passes


def check_arguments(horovods: Mapping[str, Any]) -> None:
    """Let Horovod's other arguments pass at the values that mean what happens here anyway.

    Raises: TypeError for an argument that is neither ours nor Horovod's; ValueError for a value of
        one of Horovod's that asks for something else, with what takes its place.
    """
    for name, value in horovods.items():
        if name not in _INSTEAD:
            raise TypeError(f"DistributedOptimizer got an unexpected argument {name!r}")
        if not _is_neutral(name, value):
            raise ValueError(f"{name} is {value!r}; {_INSTEAD[name]}")


def _is_neutral(name: str, value: Any) -> bool:
    hvd = sys.modules.get("horovod.torch")
    if name == "op":
        return hvd is not None and value == hvd.Average
    if name == "process_set":
        return hvd is not None and value is hvd.global_process_set
    return value is None or value == (1.0 if name == "gradient_predivide_factor" else 0)


def compressor_name(value: Any) -> str | None:
    """Return the name of one of Horovod's compressors, such as `FP16Compressor`; else None."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if kind.__module__ == "horovod.torch.compression" else None
