"""The memory that an operation on a CPU allocates and frees within itself.

oneDNN computes in layouts of its own, and in float32 where the processor has no 16-bit arithmetic.
For float32 tensors its workspace is much the same on all processors, and rules predict it. For
16-bit tensors it depends on the processor's instructions: the operation is run on small real
tensors while torch's allocator is watched. So a prediction for 16 bits holds for processors like
the one on which it was made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
LAYER = aten.mkldnn_rnn_layer.default
_LAYERS = (LAYER, aten.mkldnn_rnn_layer_backward.default)
_GATES = 4  # of an LSTM; oneDNN stores so many numbers for each word and hidden unit
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1,  # operation -> number of its left factor
             aten.bmm.default: 0, aten.baddbmm.default: 1}  # fmt: skip
# operation -> numbers of the arguments that have an axis of samples
_CONVOLUTIONS = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}
_SHORT = (torch.bfloat16, torch.float16)
_SMALL = 256  # rows and columns of the product that is tried
_FEW, _MORE = 8, 16  # samples of the two convolutions that are tried
_SLACK = 4096  # bytes: the most that a product allocates beside its accumulator


def taken_inside(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return, as fake tensors, what an operation allocates within itself, for those that need much.

    In float32 this is within 4% of what our networks' operations took. The gradient of a
    convolution's weight is computed in a layout of its own, from the gradient of the outputs in
    another layout.
    """
    if func in _LAYERS:
        return _of_layer(func, args[0], args[1:3], args[5])
    first = args[0] if args and isinstance(args[0], Tensor) else None
    if first is None or first.device.type != "cpu":
        return []
    if func in _PRODUCTS:
        return _of_product(func, args[_PRODUCTS[func]], args[_PRODUCTS[func] + 1])
    if func in _CONVOLUTIONS and first.dtype in _SHORT:
        return [first.new_empty(_of_convolution(func, args), dtype=torch.uint8)]
    if func is aten.convolution_backward.default:
        return [x.new_empty(x.shape) for x in (args[2], args[0])]
    return []


def _of_layer(
    func: Any, words: Tensor, weights: Sequence[Tensor], state: Tensor
) -> list[Tensor]:
    """Return what a layer of an LSTM allocates: both weights in another layout, the gates of words.

    With 16-bit tensors, the copies of the weights and the gradients that it computes are float32,
    and gates are stored only if the processor has no 16-bit arithmetic.
    """
    taken = [weight.new_empty(weight.shape, dtype=torch.float32) for weight in weights]
    if words.dtype in _SHORT and func is not LAYER:
        taken += [x.new_empty(x.shape, dtype=torch.float32) for x in (words, *weights)]
    if words.dtype not in _SHORT or _accumulates_apart(aten.mm.default, words.dtype):
        num_words = words.shape[0] * words.shape[1]
        taken.append(words.new_empty(num_words, _GATES * state.shape[-1]))
    return taken


def _of_product(func: Any, left: Tensor, right: Tensor) -> list[Tensor]:
    if left.dtype not in _SHORT or not _accumulates_apart(func, left.dtype):
        return []
    return [left.new_empty((left.shape[-2], right.shape[-1]), dtype=torch.float32)]


@functools.cache
def _accumulates_apart(func: Any, dtype: torch.dtype) -> bool:
    """Tell whether this processor sums up a product in a float32 matrix beside the result."""
    is_matrix = func in (aten.mm.default, aten.addmm.default)
    shape = (_SMALL, _SMALL) if is_matrix else (1, _SMALL, _SMALL)
    size = 4 * _SMALL * _SMALL
    with _disable_current_modes():
        operand = torch.zeros(shape, dtype=dtype, device="cpu")
    taken = _beside_results(lambda: func(*[operand] * (2 + _PRODUCTS[func])))
    return size <= taken <= size + _SLACK


def _of_convolution(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that a convolution allocates, by a line through two tries on few samples."""
    num_samples = args[0].shape[0]
    described = tuple(_described(arg) for arg in args)
    if num_samples <= _MORE:
        return _tried(func, described, num_samples)
    few, more = (_tried(func, described, number) for number in (_FEW, _MORE))
    return round(more + (more - few) / (_MORE - _FEW) * (num_samples - _MORE))


class _Described(NamedTuple):
    """The properties of a tensor on which an operation's memory depends."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: torch.memory_format


def _described(arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return tuple(arg) if isinstance(arg, list) else arg
    last = arg.dim() == 4 and arg.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last and not arg.is_contiguous() else torch.contiguous_format
    return _Described(tuple(arg.shape), arg.dtype, order)


@functools.lru_cache(maxsize=1024)
def _tried(func: Any, described: Sequence[Any], num_samples: int) -> int:
    args = []
    with _disable_current_modes():
        for number, arg in enumerate(described):
            if isinstance(arg, _Described):
                has_samples = number in _CONVOLUTIONS[func]
                shape = (num_samples, *arg.shape[1:]) if has_samples else arg.shape
                arg = torch.zeros(shape, dtype=arg.dtype, device="cpu")
                arg = arg.contiguous(memory_format=described[number].order)
            args.append(list(arg) if isinstance(arg, tuple) else arg)
    return _beside_results(lambda: func(*args))


def _beside_results(call: Callable[[], Any]) -> int:
    """Return the peak of a call's allocations, less what is still allocated when it returns."""
    with _disable_current_modes():
        call()  # once before, for what a first call makes and keeps
    with (
        _disable_current_modes(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen,
    ):
        result = call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak - live


_SAMPLES = 16  # for fewer samples oneDNN rounds its workspace up


def layer_workspace(*args: Any) -> int:
    """Return the bytes that oneDNN's recurrent layer keeps for backward.

    Torch's fake layer does not know them, so the real one is run on few samples.
    """
    num_samples = args[0].shape[1]
    few = min(num_samples, _SAMPLES)
    small = [(x.shape[0], few, *x.shape[2:]) if n == 0 else (few, *x.shape[1:]) if n in (5, 6)
             else x.shape for n, x in enumerate(args[:7])]  # fmt: skip
    with _disable_current_modes(), torch.enable_grad():  # without gradients it keeps nothing
        zeros = [torch.zeros(shape, dtype=args[0].dtype, device="cpu") for shape in small]
        found = aten.mkldnn_rnn_layer.default(*zeros, *args[7:])
    return found[3].numel() * num_samples // few
