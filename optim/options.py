"""The allowed values of each option of the optimizers and sketches, in one table, and its check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from parsimony_kernels.runtime.operands import MAX_DEPTH, MAX_ROWS, STATE_DTYPES

STRUCTURE_NAMES = ("full", "cover", "factored", "sketch")


def _number(low: float, high: float = math.inf, *, below: bool = False) -> Callable[[Any], bool]:
    return lambda x: low <= float(x) < high if below else low <= float(x) <= high


def _count(low: int, high: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda x: x in allowed


def _are_betas(x: Any) -> bool:
    return len(x) == 2 and all(0 <= b < 1 for b in x) and _are_alike(x)


def _are_alike(betas: Any) -> bool:
    return len({isinstance(b, Tensor) for b in betas}) == 1


_at_least_0 = (_number(0, math.inf, below=True), "0 or more, and finite")
_below_1 = (_number(0, 1, below=True), "from 0 to below 1")
_yes_or_no = (_one_of(True, False), "True or False")

# option -> (a function that tells whether a value is allowed, the allowed values in words)
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _at_least_0,
    "eps": _at_least_0,
    "weight_decay": _at_least_0,
    "momentum": _below_1,
    "beta": _below_1,
    "alpha": _below_1,
    "betas": (_are_betas, "two, from 0 to below 1"),
    "decoupled_weight_decay": _yes_or_no,
    "maximize": _yes_or_no,
    "min_compressed_numel": (_count(0, 2**63), "an integer, 0 (compress all) or more"),
    "first_moment": (_one_of("full", "sketch"), "full, sketch"),
    "second_moment": (_one_of(*STRUCTURE_NAMES), ", ".join(STRUCTURE_NAMES)),
    "variant": (_one_of("I", "II"), "I, II"),
    "num_rows": (_count(0, MAX_ROWS), f"an integer, 0 to {MAX_ROWS}"),
    "dim": (_count(0, 2**63), "an integer, 0 or more"),
    "depth": (_count(1, MAX_DEPTH), f"an integer, 1 to {MAX_DEPTH}"),
    "size_ratio": (lambda x: 0 < x < math.inf, "above 0; 0.2 is a fifth of the full size"),
    "width": (
        lambda x: x is None or _count(1, MAX_ROWS - 1)(x),
        f"an integer, 1 to {MAX_ROWS - 1}, or None to take it from size_ratio",
    ),
    "dtype": (_one_of(*STATE_DTYPES), ", ".join(map(str, STATE_DTYPES))),
    "seed": (_count(0, 2**32 - 1), f"an integer, 0 to {2**32 - 1}"),
    "clean_factor": (_number(0, 1), "0 to 1 (the paper's is 0.2)"),
    "clean_interval": (
        lambda x: x is None or _count(1, 2**63)(x),
        "a number of steps, 1 or more (the paper's is 125), or None for no cleaning",
    ),
}

# Keywords of torch that no optimizer here needs. They are accepted, so that scripts and checkpoints
# that name them work, with the values that change nothing: those that are false.
NEUTRAL: dict[str, str] = {
    "amsgrad": "False: the largest second moment is not kept; torch.optim.Adam does",
    "centered": "False: the mean gradient is not kept; torch.optim.RMSprop does",
    "nesterov": "False: torch.optim.SGD has Nesterov's momentum",
    "dampening": "0: torch.optim.SGD dampens",
    "lr_decay": "0: let a scheduler do it, LambdaLR(optimizer, lambda t: 1 / (1 + lr_decay * t))",
    "initial_accumulator_value": "0: set eps, or add it to the sums in the optimizer's state",
    "foreach": "None, False: all tensors are stepped together already",
    "fused": "None, False: all tensors are stepped together already",
    "capturable": "False: a CUDA graph would repeat one step's rate and bias correction",
    "differentiable": "False: gradients do not flow through a step; torch.optim's do",
}
ALLOWED |= {
    name: (lambda x: x is None or x in (False, 0), words) for name, words in NEUTRAL.items()
}

_NAMES_IN_TORCH = {"lr": "learning rate", "eps": "epsilon value"} | {
    name: f"{name} value"
    for name in ("weight_decay", "momentum", "alpha", "lr_decay", "initial_accumulator_value")
}


def check(options: Mapping[str, Any], whose: str = "") -> None:
    """Raise ValueError for an option whose value is not allowed; unknown options are passed over.

    The message ends with torch.optim's own message for the same mistake, if it has one.
    Args: whose: words for the message that come before the option's name.
    """
    for name, value in options.items():
        if name not in ALLOWED:
            continue
        is_allowed, words = ALLOWED[name]
        try:
            fits = is_allowed(value)
        except (TypeError, ValueError, RuntimeError):  # a value of a wrong type
            fits = False
        if not fits:
            said = _as_torch_says(name, value)
            raise ValueError(f"{whose}{name} is {value!r}; allowed: {words}{said and f' ({said})'}")


def check_neutral(group: Mapping[str, Any]) -> None:
    """Raise ValueError if one of torch's keywords has been set since the group was made."""
    if any(map(group.get, NEUTRAL)):
        check({name: group.get(name) for name in NEUTRAL})


def _as_torch_says(name: str, value: Any) -> str:
    """Return torch.optim's message for this value, "" if it has none."""
    try:
        if name == "lr" and isinstance(value, Tensor) and value.numel() != 1:
            return "Tensor lr must be 1-element"
        if name == "betas" and not _are_alike(value):
            return "betas must be either both floats or both Tensors"
        for index, beta in enumerate(value if name == "betas" else ()):
            if not 0 <= beta < 1:
                return f"Invalid beta parameter at index {index}: {beta}"
        if name in _NAMES_IN_TORCH and not value >= 0:
            return f"Invalid {_NAMES_IN_TORCH[name]}: {value}"
    except (TypeError, ValueError, RuntimeError):  # a value of a wrong type
        pass
    return ""


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer, given the `locals()` of its constructor."""
    return {k: v for k, v in arguments.items() if k not in ("self", "params", "__class__")}
