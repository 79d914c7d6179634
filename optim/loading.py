"""What a checkpoint brings, ours or torch's, made into what is kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim import options
from optim.moments import SEEDS, Cover, Factored, Full, Moment, matrix_shape, tensors_of

Group = dict[str, Any]

FIRST_NAMES = ("exp_avg", "momentum_buffer")  # of the first moments of all optimizers here

# How state is kept and steps are made is not for a checkpoint to change; all else is.
_STAYS = (
    "first_moment", "second_moment", "min_compressed_numel", "depth", "size_ratio", "width",
    "foreach", "fused", "capturable", "differentiable", "initial_accumulator_value",
)  # fmt: skip

_OTHERS = {
    "max_exp_avg_sq": "Adam's with amsgrad", "grad_avg": "RMSprop's with centered",
    "mu_product": "NAdam's", "exp_inf": "Adamax's", "acc_delta": "Adadelta's", "ax": "ASGD's",
    "prev": "Rprop's", "row_var": "Adafactor's", "variance": "Adafactor's",
}  # fmt: skip


def merge_groups(mine: Sequence[Group], theirs: Sequence[Group]) -> list[Group]:
    """Return a checkpoint's groups, each with its own options and with ours for what it lacks.

    Raises: ValueError for an option that cannot be.
    """
    groups = []
    for number, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        kept = {name: here[name] for name in _STAYS if name in here}
        groups.append({**here, **there, **kept, "params": there["params"]})
        options.check(groups[-1], whose=f"in group {number} of the checkpoint ")
    return groups


def read_state(theirs: Mapping[str, Any], older_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a parameter's loaded state, dense, by the names that they have now."""
    found = {}
    for name, tensor in tensors_of(theirs).items():
        for older, now in older_names.items():
            if name == older or name.startswith(f"{older}_"):
                name = now + name.removeprefix(older)
        found[name] = tensor.to_dense() if tensor.is_sparse else tensor
    return found


def refuse_others(position: int, theirs: Mapping[str, Tensor], layout: Mapping[str, Any]) -> None:
    """Raise ValueError if what a checkpoint keeps is known to be another rule's."""
    for name in theirs.keys() - layout.keys():
        if name in _OTHERS:
            raise ValueError(
                f"the checkpoint keeps {name} for parameter {position}, which is {_OTHERS[name]} "
                f"in torch.optim; allowed: {sorted(layout)}. Load it there: no optimizer here goes "
                f"on with that"
            )


def drop_first(state: dict[str, Tensor]) -> None:
    """Forget a first moment, where its weight has become 0."""
    for name in FIRST_NAMES:
        if name in state:
            del state[name]
            state.pop(name + SEEDS, None)


def is_to_be_compressed(moment: Moment, theirs: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint keeps in full what is compressed here."""
    full = theirs.get(moment.spec.name)
    return (
        full is not None
        and not isinstance(moment, Full)
        and not theirs.keys() >= set(moment.names())
        and tuple(full.shape) == moment.spec.shape
    )


def compress(moment: Moment, full: Tensor) -> None:
    """Make a moment, 0 until now, the one of which `full` has every element.

    Factored means, sums in a sketch, and a first moment in one are what they would have been if
    kept from the start. A cover is the lowest that bounds all; an average in a count-min sketch
    some times what it would have been (2 where few rows arrive at a time, 10 where all do), so that
    steps are smaller until it forgets.
    """
    full = full.detach().to(moment.spec.dtype)
    matrix = full.reshape(matrix_shape(moment.spec.shape, 1))
    if isinstance(moment, Factored):
        for axis, tensor in zip((1, 0), moment.tensors.values(), strict=True):
            tensor.copy_(matrix.mean(axis))
    elif isinstance(moment, Cover):
        for tensor in moment.tensors.values():
            others = [k for k, size in enumerate(full.shape) if tensor.shape[k] != size]
            tensor.copy_(full.amax(others, keepdim=True) if others else full)
    else:
        rows = torch.arange(len(matrix), device=full.device)
        moment.sketch.insert(rows, matrix.contiguous())


def _with_all_axes(layout: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a loaded state, completed if torch-SM3 kept rows alone in it, of sparse gradients.

    Lacking are the other axes, which are to bound nothing beyond the rows, and a momentum of 0.
    """
    row, mine = theirs.get("accumulator_0"), layout.get("accumulator_0")
    if row is None or mine is None or row.dim() != 1 or row.numel() != mine.numel():
        return theirs
    lacking = {
        name: row.amax() if name.startswith("accumulator") else row.new_zeros(())
        for name in layout.keys() - theirs.keys() - {"step"}
    }
    lacking = {name: value.expand(layout[name].shape) for name, value in lacking.items()}
    return {**theirs, **lacking, "accumulator_0": row.view(mine.shape)}


def fit_state(
    position: int, layout: dict[str, Tensor], theirs: Mapping[str, Any], device: torch.device
) -> dict[str, Tensor]:
    """Return copies of a parameter's loaded state, where it has the layout's names and shapes."""
    mine = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    theirs = _with_all_axes(layout, tensors_of(theirs))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    if shapes != mine:
        raise ValueError(
            f"the checkpoint keeps {shapes} for parameter {position}; allowed: {mine}, as here. "
            f"Make the optimizer with the options that the checkpoint was made with"
        )
    fitted = {}
    for name, tensor in layout.items():
        stays = name == "step" or name.endswith(SEEDS)
        if name.endswith(SEEDS) and theirs[name].dtype != tensor.dtype:
            raise ValueError(f"{name} is {theirs[name].dtype}; allowed: {tensor.dtype}")
        place = torch.device("cpu") if stays else device
        copy = theirs[name].detach().to(place, tensor.dtype, copy=True)
        fitted[name] = copy.contiguous()
    return fitted
