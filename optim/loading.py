"""Turn the optimizer state of a checkpoint, ours or torch's, into the state that is kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim import options
from optim.matrix import matrix_shape
from optim.moments import SEEDS, Cover, Factored, Full, Moment

Group = dict[str, Any]

FIRST_NAMES = ("exp_avg", "momentum_buffer")  # the first moments of all optimizers here

# Options that a checkpoint does not change: how state is kept, and how steps are computed.
_NOT_FROM_CHECKPOINTS = (
    "first_moment", "second_moment", "min_compressed_numel", "depth", "size_ratio", "width",
    "foreach", "fused", "capturable", "differentiable", "initial_accumulator_value",
)  # fmt: skip

# State of optimizers of torch whose rule no optimizer here has -> whose it is.
_OF_OTHER_RULES = {
    "max_exp_avg_sq": "Adam's with amsgrad", "grad_avg": "RMSprop's with centered",
    "mu_product": "NAdam's", "exp_inf": "Adamax's", "acc_delta": "Adadelta's", "ax": "ASGD's",
    "prev": "Rprop's", "row_var": "Adafactor's", "variance": "Adafactor's",
}  # fmt: skip


def merge_groups(mine: Sequence[Group], theirs: Sequence[Group]) -> list[Group]:
    """Return a checkpoint's groups, completed by our values of the options that they lack.

    Raises: ValueError for an option whose value is not allowed.
    """
    groups = []
    for number, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        kept = {name: here[name] for name in _NOT_FROM_CHECKPOINTS if name in here}
        groups.append({**here, **there, **kept, "params": there["params"]})
        options.check(groups[-1], whose=f"in group {number} of the checkpoint ")
    return groups


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a loaded state; `step` may be a number, which becomes a tensor."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if "step" in state and "step" not in tensors:
        tensors["step"] = torch.tensor(state["step"], dtype=torch.float32, device="cpu")
    return tensors


def read_state(theirs: Mapping[str, Any], older_names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a parameter's loaded state, made dense, by their present names.

    Args: older_names: a name, or the beginning of one, in older checkpoints -> the present one.
    """
    found = {}
    for name, tensor in tensors_of(theirs).items():
        for older, now in older_names.items():
            if name == older or name.startswith(f"{older}_"):
                name = now + name.removeprefix(older)
        found[name] = tensor.to_dense() if tensor.is_sparse else tensor
    return found


def refuse_other_rules(
    position: int, theirs: Mapping[str, Tensor], layout: Mapping[str, Any]
) -> None:
    """Raise ValueError if a checkpoint has state of a rule that no optimizer here follows."""
    for name in theirs.keys() - layout.keys():
        if name in _OF_OTHER_RULES:
            whose = _OF_OTHER_RULES[name]
            raise ValueError(
                f"the checkpoint keeps {name} for parameter {position}, which is {whose} "
                f"in torch.optim; allowed: {sorted(layout)}. Load it there: no optimizer here goes "
                f"on with that"
            )


def drop_first(state: dict[str, Tensor]) -> None:
    """Remove a first moment from a parameter's state, because betas[0] or momentum is now 0."""
    for name in FIRST_NAMES:
        if name in state:
            del state[name]
            state.pop(name + SEEDS, None)


def is_to_be_compressed(moment: Moment, theirs: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint has in full a moment that is kept in another structure here."""
    full = theirs.get(moment.spec.name)
    return (
        full is not None
        and not isinstance(moment, Full)
        and not theirs.keys() >= set(moment.names())
        and tuple(full.shape) == moment.spec.shape
    )


def compress(moment: Moment, full: Tensor) -> None:
    """Put a moment of which `full` has every element into the structure of `moment`, which is 0.

    Factored means, sums in a sketch and first moments in a sketch become what they would be if they
    had been kept so from the start. A cover gets the lowest accumulators that bound every element.
    An average in a count-min sketch becomes larger than it would be, by a factor of about 2 if few
    rows arrive at a time and 10 if all do, so that steps are smaller until it forgets.
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
    """Complete a loaded state of torch-SM3, which for sparse gradients keeps the first axis alone.

    The accumulators of the other axes become the maximum of the first, so that they bound nothing
    more; a missing momentum becomes 0. Any other state is returned as it is.
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
    """Return a copy of a parameter's loaded state, on its device and in the layout's dtypes.

    Raises: ValueError if the names or shapes of the state are not those of the layout.
    """
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
        is_on_cpu = name == "step" or name.endswith(SEEDS)
        if name.endswith(SEEDS) and theirs[name].dtype != tensor.dtype:
            raise ValueError(f"{name} is {theirs[name].dtype}; allowed: {tensor.dtype}")
        target = torch.device("cpu") if is_on_cpu else device
        copy = theirs[name].detach().to(target, tensor.dtype, copy=True)
        fitted[name] = copy.contiguous()
    return fitted
