"""What a worker keeps of a flattened tensor, 4, 2 or 1 bytes an element, and the pass over it.

A buffer is float32, bfloat16 or 8-bit blocks of 256 (operands.Blocks). Values are rounded
stochastically to bfloat16 and to 8 bits: up or down, with odds that make the mean exact. What is
drawn is a hash of a key and the element's number, so every implementation rounds alike, and no
state of a generator is kept.
For a float64 tensor, a float64 buffer takes the place of a float32 one, and the arithmetic is
float64; values are converted to float32 before they are rounded further. float64 tensors always
run in plain torch.

Passes over whole tensors and `put` have three implementations, which work for many tensors at once.
The rest is plain torch: `take` and `add` are for few elements, `decode` for tests and for what is
sent whole.
Shapes: N elements of a flattened tensor, K selected of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parsimony_kernels.buffers.checks import (
    check_lagging_pass,
    check_part,
    check_pass,
    is_usual,
)
from parsimony_kernels.buffers.operands import (
    BLOCK,
    LEVELS,
    Blocks,
    Buffer,
    Correction,
    Found,
    Pass,
    Put,
    Selection,
    arithmetic_dtype,
)
from parsimony_kernels.buffers.operands import Report as Report
from parsimony_kernels.buffers.operands import join_reports as join_reports
from parsimony_kernels.buffers.operands import read_reports as read_reports
from parsimony_kernels.buffers.operands import split_reports as split_reports
from parsimony_kernels.buffers.operands import tensors as tensors
from parsimony_kernels.buffers.reference import decode as decode
from parsimony_kernels.buffers.reference import round_codes
from parsimony_kernels.runtime.choice import implementing_module
from parsimony_kernels.runtime.operands import STATE_DTYPES

DTYPES = ("float32", "bfloat16", "int8")


def empty(numel: int, dtype: str, device: torch.device) -> Buffer:
    """Return a buffer to write to. dtype: float32, float64, bfloat16, or int8 for 8-bit blocks."""
    if dtype == "int8":
        scales = torch.empty(-(-numel // BLOCK), dtype=torch.float32, device=device)
        return Blocks(torch.empty(numel, dtype=torch.int8, device=device), scales)
    return torch.empty(numel, dtype=getattr(torch, dtype), device=device)


def from_tensors(parts: tuple[Tensor, ...]) -> Buffer:
    return Blocks(*parts) if len(parts) == 2 else parts[0]


def dtype_of(buffer: Buffer) -> str:
    """Return which of DTYPES a buffer is, or float64."""
    return "int8" if isinstance(buffer, Blocks) else str(buffer.dtype).removeprefix("torch.")


def numel(buffer: Buffer) -> int:
    return tensors(buffer)[0].numel()


def count_nonzero(buffer: Buffer) -> Tensor:
    """Return how many elements are not 0, (), int64. Waits for no GPU."""
    return tensors(buffer)[0].count_nonzero()


def take(buffer: Buffer, indices_K: Tensor) -> Tensor:
    """Return the values (K,) at indices (K,) int64: float64 of a float64 buffer, else float32."""
    if not isinstance(buffer, Blocks):
        values_K = buffer[indices_K]
        return values_K.float() if buffer.dtype == torch.bfloat16 else values_K
    return buffer.codes[indices_K] * buffer.scales[indices_K // BLOCK]


def put(buffer: Buffer, indices_K: Tensor, values_K: Tensor | None, key: int) -> None:
    """Write values (K,) float32 or float64, or 0 (None), at unique indices; 0 is written exactly.

    Values that `take` returned become what they were, whatever the key. The scales of 8-bit blocks
    do not change, so no value may exceed the largest that its block can hold.
    Raises: IndexError for indices outside of the buffer, on a CPU.
    """
    put_together([Put(buffer, indices_K.numel(), 0, key)], indices_K, values_K)


def put_together(puts: Sequence[Put], positions_K: Tensor, values_K: Tensor | None) -> None:
    """Do as `put` with several buffers, on one device, of float64 all or none."""
    puts = [each for each in puts if each.count]
    if not puts:
        return
    is_double = tensors(puts[0].buffer)[0].dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    values_K = None if values_K is None else values_K.to(dtype).contiguous()
    module = implementing_module("buffers", positions_K.device.type, dtype)
    module.put(puts, positions_K.contiguous(), values_K)


def add(buffer: Buffer, indices_K: Tensor, values_K: Tensor, key: int) -> None:
    """Add values (K,) at unique indices, however large: a block's scale grows if it must.

    If a block's scale has grown, `put` cannot restore to the bit what was taken out before.
    """
    sums_K = take(buffer, indices_K) + values_K
    if isinstance(buffer, Blocks):
        _make_room(buffer, indices_K, sums_K.float(), key)
    put(buffer, indices_K, sums_K, key)


def _make_room(buffer: Blocks, indices_K: Tensor, values_K: Tensor, key: int) -> None:
    needed_K = values_K.abs() / values_K.new_tensor(LEVELS)  # see reference._store
    scales = buffer.scales.scatter_reduce(0, indices_K // BLOCK, needed_K, "amax")
    blocks = (scales > buffer.scales).nonzero()
    within = torch.arange(BLOCK, dtype=torch.int64, device=blocks.device)
    elements = (blocks * BLOCK + within).view(-1)
    elements = elements[elements < buffer.codes.numel()]
    before = take(buffer, elements)
    buffer.scales.copy_(scales)
    buffer.codes[elements] = round_codes(before, scales[elements // BLOCK], elements, key)


def pass_of(
    grad_N: Tensor | None,
    correction: Correction,
    *,
    residual: Buffer,
    old_residual: Buffer | None,
    velocity: Buffer | None = None,
    old_velocity: Buffer | None = None,
    scale: Tensor | None = None,
    key: int = 0,
    selection: Selection | None = None,
    first: int = 0,
) -> Pass:
    """Return a pass that adds a gradient to velocity and residual and takes large entries out.

    With x = scale * grad:  u = u_beta old_velocity + u_gain x;  v = old_residual + (v_from_u u +
    v_gain x), where u is not rounded yet. Each operation is rounded to float32, or to float64 for a
    float64 gradient.
    The entries that `selection` takes out are listed, v and u as they are before rounding, and are
    exactly 0 in the buffers. They can be put back: `put(residual, indices, values, key)` and
    `put(velocity, indices, velocities, key ^ VELOCITY_KEY)`, with this pass's key, leave to the bit
    what the pass would have left without a selection. This holds for any part of the entries and
    after any number of selections, since a block's scale is always that of all its values.
    Args: grad_N: (N,) float32, bfloat16, float16 or float64. None: nothing is added, and the
            selection is from what is stored. Only what is selected is written then, no scales; the
            old buffers must be the same as the new, or None.
        residual, velocity: written.
        old_residual, old_velocity: read; None counts as zeros. They are the new buffers, or others,
            which may be stored in another way.
        scale: (1,) float32, for a float64 gradient float64, or None for 1.
        key: 64 bits, for the stochastic rounding. first: what is added to the indices that are
            listed. Of what is found, `largest` is max |x|, infinite or NaN if an x is.
    Cost:    every buffer is read and written once. Nothing waits for a GPU.
    Example: residual [1, -3, 0], grad [1, 0, 0], threshold 2 -> residual [0, 0, 0], listed
        {0: 2, 1: -3}.
    """
    stored = (residual, old_residual, velocity, old_velocity)
    given = Pass(grad_N, correction, *stored, scale, key, selection, first=first)
    if not is_usual(grad_N, stored, scale):
        check_pass(given)
    if velocity is None and (old_velocity is not None or correction.v_from_u):
        raise ValueError("old_velocity or v_from_u without a velocity to write")
    return given


def accumulate(grad_N: Tensor | None, correction: Correction, **more: Any) -> Found:
    """Make one pass, with the arguments of `pass_of`."""
    return accumulate_together([pass_of(grad_N, correction, **more)])[0][0]


def accumulate_together(passes: Sequence[Pass]) -> tuple[list[Found], Tensor]:
    """Make passes over several tensors, on one device and in one dtype of arithmetic.

    Returns: what each has found; and their reports, one after another, of which those are parts.
    Raises: ValueError for passes that cannot go together.
    """
    kinds = {(each.device, arithmetic_dtype(each)) for each in passes}
    if len(kinds) != 1:
        raise ValueError(f"passes of {len(kinds)} devices or dtypes; allowed: 1")
    ((device, dtype),) = kinds
    return implementing_module("buffers", device.type, dtype).accumulate(passes)


def lagging_pass_of(
    grad_N: Tensor,
    momentum: float,
    selection: Selection,
    *,
    residual: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    is_lagging: bool,
    scale: Tensor | None = None,
    first: int = 0,
) -> Pass:
    """Return a pass that does as one of `pass_of` with masked velocities, but needs no second
    residual.

    A residual lags if the velocity beside it is still to be added to it; the two are stored without
    loss. What is left lags: `velocity` is new, momentum old_velocity + scale * grad, and 0 where
    entries are taken out; `residual` is as it was before the step, and does not lag behind
    old_velocity any more. So old_velocity is all that undoing the step needs. If the step stands,
    what was taken out is yet to be made 0 in `residual`, which then lags behind `velocity`.
    Velocities, what is listed and the sum are to the bit those of `pass_of`, with
    `Correction(momentum, 1, 1, 0)`, for finite gradients and a residual without -0.0.
    Args: residual: (N,), changed in place: if is_lagging, old_velocity is added.
        velocity: (N,), written; it may be the gradient's own memory.
        Both, and old_velocity, are float32, or float64 for a float64 gradient.
    Cost:    as `pass_of`.
    Example: residual [1, -3], old_velocity [1, 0], lagging, grad [1, 1], momentum 1, threshold 3
        -> listed {0: 4}, velocities {0: 2}; velocity [0, 1]; residual [2, -3].
    """
    stored = (residual, velocity, old_velocity)
    given = Pass(
        grad_N, _masked(momentum), residual, residual, velocity, old_velocity, scale, 0, selection,
        is_lagging, lags=True, first=first,
    )  # fmt: skip
    is_exact = all(getattr(each, "dtype", None) == torch.float32 for each in stored)
    if not is_exact or not is_usual(grad_N, stored, scale):
        check_lagging_pass(given)
    if not selection.mask_velocity:
        raise ValueError("selection.mask_velocity is False; allowed: True where a residual lags")
    return given


@functools.lru_cache(maxsize=64)
def _masked(momentum: float) -> Correction:
    return Correction(momentum, 1, 1, 0)


def accumulate_lagging(grad_N: Tensor, momentum: float, selection: Selection, **more: Any) -> Found:
    """Make one pass, with the arguments of `lagging_pass_of`."""
    return accumulate_together([lagging_pass_of(grad_N, momentum, selection, **more)])[0][0]


def select_lagging(
    residual: Tensor, velocity: Tensor, selection: Selection, first: int = 0
) -> Found:
    """Select from a residual (N,) that lags; what is taken out is made 0 in the velocity alone."""
    n, device = residual.numel(), residual.device
    check_part("residual", residual, STATE_DTYPES, n, device)
    check_part("velocity", velocity, (residual.dtype,), n, device)
    stored = (residual, residual, velocity, None)
    given = Pass(None, Correction(), *stored, None, 0, selection, lags=True, first=first)
    return accumulate_together([given])[0][0]
