"""What a worker keeps of a flattened tensor, 4, 2 or 1 bytes an element, and the passes over it.

A buffer is float32, bfloat16 or 8-bit blocks of 256 (operands.Blocks). Writing to one of fewer bits
rounds stochastically: up or down, with the odds that make the mean exact. The odds come from a hash
of a key and the element's number, so that every implementation rounds alike and nothing is stored.

`accumulate` and `select_above` pass over whole tensors, and have three implementations like the
operations in ops.py. The rest is plain torch: `take` and `put` are for few elements, `decode` for
tests and for what is sent whole.
Shapes: N elements of a flattened tensor, K selected of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import check_shape, check_tensor
from kernels.operands import (
    BLOCK,
    PARAMETER_DTYPES,
    STORED_DTYPES,
    Blocks,
    Buffer,
    Correction,
)
from kernels.ops import implementing_module
from kernels.reference_buffers import decode as decode
from kernels.reference_buffers import round_bfloat16, round_codes

DTYPES = ("float32", "bfloat16", "int8")


def empty(numel: int, dtype: str, device: torch.device) -> Buffer:
    """Return a buffer to write to. dtype: float32, bfloat16, or int8 for 8-bit blocks."""
    if dtype == "int8":
        scales = torch.empty(-(-numel // BLOCK), device=device)
        return Blocks(torch.empty(numel, dtype=torch.int8, device=device), scales)
    return torch.empty(numel, dtype=getattr(torch, dtype), device=device)


def tensors(buffer: Buffer) -> tuple[Tensor, ...]:
    """Return the tensors in which a buffer lives; `from_tensors` makes it of them again."""
    return (buffer.codes, buffer.scales) if isinstance(buffer, Blocks) else (buffer,)


def from_tensors(parts: tuple[Tensor, ...]) -> Buffer:
    return Blocks(*parts) if len(parts) == 2 else parts[0]


def dtype_of(buffer: Buffer) -> str:
    """Return which of DTYPES a buffer is."""
    return "int8" if isinstance(buffer, Blocks) else str(buffer.dtype).removeprefix("torch.")


def numel(buffer: Buffer) -> int:
    return tensors(buffer)[0].numel()


def take(buffer: Buffer, indices_K: Tensor) -> Tensor:
    """Return the values (K,) float32 at indices (K,) int64."""
    if not isinstance(buffer, Blocks):
        return buffer[indices_K].float()
    return buffer.codes[indices_K] * buffer.scales[indices_K // BLOCK]


def put(buffer: Buffer, indices_K: Tensor, values_K: Tensor | float, key: int) -> None:
    """Write values (K,) float32, or one for all, at indices; 0 is written exactly.

    In blocks the scale stays as it is: no value may be beyond the largest of its block.
    """
    if not isinstance(values_K, Tensor):
        values_K = torch.full(indices_K.shape, values_K, device=indices_K.device)
    if isinstance(buffer, Blocks):
        scales_K = buffer.scales[indices_K // BLOCK]
        buffer.codes[indices_K] = round_codes(values_K, scales_K, indices_K, key)
    elif buffer.dtype == torch.bfloat16:
        buffer[indices_K] = round_bfloat16(values_K, indices_K, key)
    else:
        buffer[indices_K] = values_K


def accumulate(
    grad_N: Tensor,
    correction: Correction,
    *,
    residual: Buffer,
    old_residual: Buffer | None,
    velocity: Buffer | None = None,
    old_velocity: Buffer | None = None,
    scale: Tensor | None = None,
    key: int = 0,
) -> Tensor:
    """Add a gradient to velocity and residual, in one pass; write them anew; return the largest.

    With x = scale * grad:  u = u_decay old_velocity + u_gain x;  v = old_residual + (v_from_u u +
    v_gain x), from the u that rounding has not touched. All in float32, rounded by operation.
    Args: grad_N: (N,) float32, bfloat16 or float16.
        residual, velocity: written; the old ones, if other than they, are not. Old ones that are
            None count as zeros; they may be stored otherwise than the new.
        scale: (1,) float32, or None for 1.
        key: 64 bits; of the stochastic rounding.
    Returns: (1,) float32: max |x|; infinite or NaN if an x is.
    """
    n, device = grad_N.numel(), grad_N.device
    check_tensor("grad", grad_N, device, PARAMETER_DTYPES, 1)
    _check_buffer("residual", residual, n, device)
    _check_buffer("old_residual", old_residual, n, device)
    _check_buffer("velocity", velocity, n, device)
    _check_buffer("old_velocity", old_velocity, n, device)
    if scale is not None:
        check_shape("scale", scale, (1,), device)
    if velocity is None and (old_velocity is not None or correction.v_from_u):
        raise ValueError("old_velocity or v_from_u without a velocity to write")
    if n == 0:
        return torch.zeros(1, device=device)
    return implementing_module("_buffers", device.type).accumulate(
        grad_N, correction, residual, old_residual, velocity, old_velocity, scale, key
    )


def select_above(buffer: Buffer, threshold: float) -> Tensor:
    """Return the ascending indices (K,) int64 of values with |v| >= threshold and v not 0."""
    device = tensors(buffer)[0].device
    _check_buffer("buffer", buffer, numel(buffer), device)
    if numel(buffer) == 0:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return implementing_module("_buffers", device.type).select_above(buffer, threshold)


def _check_buffer(name: str, buffer: Buffer | None, n: int, device: torch.device) -> None:
    if isinstance(buffer, Blocks):
        _check_part(f"{name}.codes", buffer.codes, (torch.int8,), n, device)
        _check_part(f"{name}.scales", buffer.scales, (torch.float32,), -(-n // BLOCK), device)
    elif buffer is not None:
        _check_part(name, buffer, STORED_DTYPES, n, device)


def _check_part(
    name: str, part: Tensor, dtypes: tuple[torch.dtype, ...], size: int, device: torch.device
) -> None:
    check_tensor(name, part, device, dtypes, 1)
    if part.numel() != size:
        raise ValueError(f"{name} has {part.numel()} elements; allowed: {size}")
