"""What stands in `p.grad` for a gradient that the exchange has taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ADD = (torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor)  # autograd's, of another gradient
_ZERO, _ZERO_ALL = torch.ops.aten.zero_.default, torch.ops.aten._foreach_zero_.default
_DETACH = torch.ops.aten.detach_.default
_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default  # Scaling does that


class HandedOver(Tensor):
    """A stand-in of the gradient's shape, dtype and device, without memory.

    zero_grad(), of a module or an optimizer, drops it as it would the gradient: sets it to None, or
    to zero, which `is_dropped` tells. A gradient that autograd adds to it is found in `added`.
    Whatever else would read or change it, such as clip_grad_norm_, is refused: it would do nothing.
    """

    parameter_name: str
    is_dropped: bool
    added: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, name: str, parameter: Tensor) -> HandedOver:
        stand_in = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        stand_in.parameter_name = name
        return stand_in.renew()

    def renew(self) -> HandedOver:
        """Stand for a gradient that has just been taken."""
        self.is_dropped, self.added = False, None
        return self

    def __repr__(self) -> str:
        return f"HandedOver({self.parameter_name!r})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Raises: RuntimeError for what needs the gradient's values, with what to do instead."""
        if func in _ADD and isinstance(args[0], cls):
            args[0].added = args[1]
            return args[0] if func is _ADD[0] else args[1]
        if func in (_ZERO, _ZERO_ALL):
            for stand_in in _stand_ins(args):
                stand_in.is_dropped = True
        if func in (_ZERO, _ZERO_ALL, _DETACH, _UNSCALE):
            return args[0] if func in (_ZERO, _DETACH) else None
        name = next(_stand_ins((*args, *(kwargs or {}).values()))).parameter_name
        raise RuntimeError(_REFUSAL.format(operation=func, name=name))


_REFUSAL = (
    "{operation} needs the gradient of {name}, which the exchange took when backward finished it: "
    "until step() p.grad is a stand-in. To clip, call optimizer.clip_grad_norm_(), or set "
    "Compression(clip_norm=...), which clips each gradient before it is added; the norm of the "
    "gradient is optimizer.stats.gradient_norm after step(), if clip_norm is set (math.inf clips "
    "nothing). To have gradients in p.grad until step(), for whatever you do with them: "
    "Compression(clip_norm=math.inf, clip_scope='global'). In a dense exchange the means over "
    "ranks are in p.grad after optimizer.synchronize()"
)


def _stand_ins(values: Sequence[Any]) -> Iterator[HandedOver]:
    for value in values:
        if isinstance(value, HandedOver):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _stand_ins(value)
