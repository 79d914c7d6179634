"""What stands in `p.grad` for a gradient that the exchange has taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What may be asked of it: that it is there, and what it would be.
_MAY_BE_ASKED = {
    "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "is_contiguous",
    "is_complex", "is_floating_point", "is_inference", "storage_offset", "untyped_storage", "type",
    "data_ptr", "get_device", "__len__", "__repr__", "__hash__", "requires_grad_", "detach_",
}  # fmt: skip
_ARE_VALUES = {"data", "T", "H", "mT", "mH", "real", "imag"}
_DROPS = {"zero_", "_foreach_zero_"}
_UNSCALES = "_amp_foreach_non_finite_check_and_unscale_"  # GradScaler: we do that (Scaling)


class HandedOver(Tensor):
    """A stand-in of the gradient's shape, dtype and device that takes no memory.

    zero_grad(), of a module or an optimizer, drops it as it would the gradient: sets it to None, or
    to zero, which `is_dropped` then tells. Whatever would read it or change it otherwise, such as
    clip_grad_norm_, is refused, since it would do nothing.
    """

    parameter_name: str
    is_dropped: bool

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> HandedOver:
        scalar = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        stand_in = scalar.expand(parameter.shape).as_subclass(cls)
        stand_in.parameter_name, stand_in.is_dropped = name, False
        return stand_in

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Raises: RuntimeError for what needs the gradient's values, with what to do instead."""
        called = func.__name__
        if called in _DROPS:
            for stand_in in _stand_ins(args):
                stand_in.is_dropped = True
            return args[0] if called == "zero_" else None
        if called == _UNSCALES:
            return None
        is_asked = called in _MAY_BE_ASKED
        if called == "__get__":
            is_asked = getattr(func.__self__, "__name__", "") not in _ARE_VALUES
        if is_asked:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(_refusal(called, _stand_ins(args)))


def _stand_ins(args: Sequence[Any]) -> list[HandedOver]:
    found = []
    for value in args:
        if isinstance(value, HandedOver):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _stand_ins(value)
    return found


def _refusal(called: str, stand_ins: Sequence[HandedOver]) -> str:
    name = stand_ins[0].parameter_name if stand_ins else "a parameter"
    return (
        f"{called} needs the gradient of {name}, which the exchange took when backward finished "
        f"it: until step() p.grad is a stand-in. To clip, call optimizer.clip_grad_norm_(), or set "
        f"Compression(clip_norm=...), which clips each gradient before it is added; the norm of "
        f"the gradient is optimizer.stats.gradient_norm after step(), if clip_norm is set "
        f"(math.inf clips nothing). To have gradients in p.grad until step(), for whatever you do "
        f"with them: Compression(clip_norm=math.inf, clip_scope='global'). In a dense exchange the "
        f"means over ranks are in p.grad after optimizer.synchronize()"
    )
