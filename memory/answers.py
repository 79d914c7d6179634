"""Answer for fake tensors, which have no data, when code asks for values or shapes depend on them.

`Answers` is a dispatch mode to be entered within a FakeTensorMode and a Tracker. In forward and
backward it gives the answers that a real run gave (written down by `Recorder`), or none. In the
exchange and the step it gives those of the steady state, in which every number is finite and
nothing is refused. It also attaches to sparse tensors of rows their indices and values, which
torch's fake sparse tensors lose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from memory.inside import LAYER, layer_workspace, taken_inside

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
UNANSWERED = (DataDependentOutputException, DynamicOutputShapeException)

_SPARSE = {  # operation that makes a sparse tensor -> number of its argument with the indices
    aten._sparse_coo_tensor_with_dims_and_tensors.default: 3,
    aten._sparse_coo_tensor_unsafe.default: 0,
    aten.sparse_coo_tensor.indices_size: 0,
}
_PARTS = {aten._indices.default: 0, aten.indices.default: 0,
          aten._values.default: 1, aten.values.default: 1}  # fmt: skip
_SAME = (aten.detach.default, aten.clone.default)  # a clone, too: autograd clones what we hold
_VALUE = (aten._local_scalar_dense.default, aten.item.default)
_COALESCE = (aten._coalesce.default, aten.coalesce.default)


def _mask(func: Any, args: Sequence[Any]) -> Tensor | None:
    """Return the mask whose true entries an operation selects; None for other operations."""
    if func is aten.nonzero.default:
        return args[0]
    if func is aten.masked_select.default:
        return args[1]
    if func is aten.index.Tensor:
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        return masks[0] if len(masks) == 1 else None
    return None


class Recorder(TorchDispatchMode):
    """Writes down the values that a real run asks for, and the fractions of its masks, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _VALUE:
            self.answers.append(result)
        elif (mask := _mask(func, args)) is not None:
            self.answers.append(int(mask.count_nonzero()) / max(1, mask.numel()))
        return result


class Answers(TorchDispatchMode):
    """Answers for fake tensors; see the module.

    Args: recorded: the answers that a Recorder wrote down in one forward and backward; None: a
        forward or backward pass that asks for a value fails.
    """

    def __init__(self, recorded: Sequence[Any] | None = None) -> None:
        super().__init__()
        self._recorded = recorded
        self._next: Iterator[Any] | None = None
        self._is_steady, self._number = False, 1
        self._rounding: dict[int, float] = {}

    @contextlib.contextmanager
    def steady(self, number: int = 1) -> Iterator[None]:
        """In the block, answer for the steady state: checks pass, and masks are true everywhere.

        Args: number: the answer for every number that is asked for.
        """
        before = self._is_steady, self._number
        self._is_steady, self._number = True, number
        try:
            yield
        finally:
            self._is_steady, self._number = before

    def begin(self) -> None:
        """Begin a forward pass: answer again from the first record on."""
        self._next = None if self._recorded is None else iter(self._recorded)
        self._rounding.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # half of all calls, so answered here, which is quicker
            return args[0].fake_device
        if func in _VALUE:
            return self._value(func, args[0])
        if (mask := _mask(func, args)) is not None and (self._is_steady or self._next):
            return _rows_of(func, args, mask, self._count(func, mask))
        if func in _PARTS and hasattr(args[0], "_rows"):
            return args[0]._rows[_PARTS[func]].detach()
        if func in _COALESCE and hasattr(args[0], "_rows"):
            return _coalesced(args[0])
        if func is aten.add_.Tensor and hasattr(args[1], "_rows"):
            return args[0]
        inside = taken_inside(func, args)
        result = func(*args, **kwargs)
        del inside
        if func in _SPARSE:
            result._rows = tuple(args[_SPARSE[func] : _SPARSE[func] + 2])
        elif func is LAYER:
            result = (*result[:3], result[3].new_empty(layer_workspace(*args)))
        elif func in _SAME and hasattr(args[0], "_rows"):
            result._rows = args[0]._rows
            result._coalesced_(args[0].is_coalesced())  # torch takes it, without rows, as coalesced
        elif func in (aten.all.default, aten.all.dim):
            result._is_all = True
        return result

    def _value(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        if not self._is_steady and self._next is not None:
            return self._recall(func)
        try:
            return func(tensor)
        except UNANSWERED:
            if not self._is_steady:
                raise
        if tensor.dtype == torch.bool:
            return hasattr(tensor, "_is_all")  # a result of all() is True, any other flag is False
        return float(self._number) if tensor.dtype.is_floating_point else self._number

    def _recall(self, func: Any) -> Any:
        for answer in self._next:
            return answer
        raise ValueError(f"the model asks for more values than it did of a real batch, with {func}")

    def _count(self, func: Any, mask: Tensor) -> int:
        """Return how many entries of a mask are true; for the same mask always the same number.

        Masks that divide the entries of a tensor among them have counts that add up to its numel:
        fractions are summed before they are rounded.
        """
        numel = mask.numel()
        if self._is_steady:
            return numel
        fraction = self._recall(func)
        if not hasattr(mask, "_num_true"):
            before = self._rounding.get(numel, 0.0)
            self._rounding[numel] = before + fraction
            mask._num_true = round((before + fraction) * numel) - round(before * numel)
        return mask._num_true


def _rows_of(func: Any, args: Sequence[Any], mask: Tensor, count: int) -> Tensor:
    if func is aten.nonzero.default:
        return mask.new_empty((count, mask.dim()), dtype=torch.int64)
    if func is aten.masked_select.default:
        return args[0].new_empty(count)
    axis = next(n for n, index in enumerate(args[1]) if index is not None)
    shape = list(args[0].shape)
    shape[axis : axis + mask.dim()] = [count]
    return args[0].new_empty(shape)


def _coalesced(tensor: Tensor) -> Tensor:
    """Return a coalesced tensor with the most rows possible: no row repeats."""
    indices, values = tensor._rows
    count = min(indices.shape[1], tensor.shape[0])
    rows = indices[:, :count].clone(), values[:count].clone()
    result = torch.sparse_coo_tensor(*rows, tensor.shape, is_coalesced=True, check_invariants=False)
    result._rows = rows
    return result
