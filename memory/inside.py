"""What an operation on a CPU takes and gives back within itself, beside what it returns.

oneDNN computes in layouts of its own, and in float32 where the processor has no 16-bit arithmetic.
In float32, what it takes is much the same on all processors, and is told by rules. In 16 bits it
differs with the instructions that there are: the operation is run for real, on small tensors, and
torch's allocator is read. So a prediction in 16 bits is of the machine on which it is made.
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
_GATES = 4  # of an LSTM, and so wide is what oneDNN lays aside for each word
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1,  # -> where the left factor is
             aten.bmm.default: 0, aten.baddbmm.default: 1}  # fmt: skip
# -> which of the arguments have an axis of samples
_CONVOLUTIONS = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}
_SHORT = (torch.bfloat16, torch.float16)
_SMALL = 256  # rows and columns of the product that is tried
_FEW, _MORE = 8, 16  # samples of the convolutions that are tried
_SLACK = 4096  # bytes: what is taken beside an accumulator, at most


def taken_inside(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return, as tensors without data, what an operation takes within itself, where that is much.

    In float32 within 4% of what it took in our networks: the gradient of a convolution's weight is
    computed in a layout of its own, from the outputs' gradient in another.
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
    """Return what an LSTM's layer takes: both weights in another layout, and the gates of every
    word; in 16 bits weights, and the gradients that it computes, are in float32, and gates are laid
    aside only where the processor lacks such arithmetic."""
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
    """Tell whether a product is summed up in a float32 matrix of its own, on this processor."""
    is_matrix = func in (aten.mm.default, aten.addmm.default)
    shape = (_SMALL, _SMALL) if is_matrix else (1, _SMALL, _SMALL)
    size = 4 * _SMALL * _SMALL
    with _disable_current_modes():
        operand = torch.zeros(shape, dtype=dtype, device="cpu")
    taken = _beside_results(lambda: func(*[operand] * (2 + _PRODUCTS[func])))
    return size <= taken <= size + _SLACK


def _of_convolution(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that a convolution takes: linear in the samples, from two tries on few."""
    num_samples = args[0].shape[0]
    described = tuple(_described(arg) for arg in args)
    if num_samples <= _MORE:
        return _tried(func, described, num_samples)
    few, more = (_tried(func, described, number) for number in (_FEW, _MORE))
    return round(more + (more - few) / (_MORE - _FEW) * (num_samples - _MORE))


class _Described(NamedTuple):
    """A tensor, as far as an operation's memory depends on it."""

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
        for place, arg in enumerate(described):
            if isinstance(arg, _Described):
                shape = (num_samples, *arg.shape[1:]) if place in _CONVOLUTIONS[func] else arg.shape
                arg = torch.zeros(shape, dtype=arg.dtype, device="cpu")
                arg = arg.contiguous(memory_format=described[place].order)
            args.append(list(arg) if isinstance(arg, tuple) else arg)
    return _beside_results(lambda: func(*args))


def _beside_results(call: Callable[[], Any]) -> int:
    """Return the most that a call had from torch's allocator at once, less what it returned."""
    with _disable_current_modes():
        call()  # what is kept for later calls is made
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


_SAMPLES = 16  # oneDNN rounds up what it needs for fewer


def layer_workspace(*args: Any) -> int:
    """Return the bytes that oneDNN's recurrent layer keeps for backward, of which torch's fake one
    knows nothing: by running it on few samples."""
    num_samples = args[0].shape[1]
    few = min(num_samples, _SAMPLES)
    small = [(x.shape[0], few, *x.shape[2:]) if n == 0 else (few, *x.shape[1:]) if n in (5, 6)
             else x.shape for n, x in enumerate(args[:7])]  # fmt: skip
    with _disable_current_modes(), torch.enable_grad():  # else nothing is kept
        zeros = [torch.zeros(shape, dtype=args[0].dtype, device="cpu") for shape in small]
        found = aten.mkldnn_rnn_layer.default(*zeros, *args[7:])
    return found[3].numel() * num_samples // few
