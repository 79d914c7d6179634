"""Whether a pass can be made of what it is given.

The native kernels are given addresses: a tensor of another size or dtype, or on another device,
would be read or written beyond its end. `is_usual` tells in a few microseconds that nothing is
wrong with nearly all that comes; of the rest, each part is checked by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import (
    BLOCK,
    STORED_DTYPES,
    Blocks,
    Buffer,
    Pass,
    Selection,
    arithmetic_dtype,
    tensors,
)
from parsimony_kernels.runtime.checks import check_shape, check_tensor
from parsimony_kernels.runtime.operands import PARAMETER_DTYPES, STEP_DTYPES, state_dtype

_ALLOWED = {torch.float32: STORED_DTYPES, torch.float64: (torch.float64, *STORED_DTYPES[1:])}
_STORED = ("residual", "old_residual", "velocity", "old_velocity")

_EXACT = frozenset(STORED_DTYPES)
_NATIVE = frozenset(PARAMETER_DTYPES)


def is_usual(grad_N: Tensor | None, stored: Sequence[Buffer | None], scale: Tensor | None) -> bool:
    """Tell whether no check can fail, of what native kernels pass over. If not, one may."""
    if grad_N is None or grad_N.dtype not in _NATIVE:
        return False
    n, device = grad_N.numel(), grad_N.device
    if not _is_plain(grad_N, n, device):
        return False
    before = None
    for buffer in stored:
        if buffer is None or buffer is before:
            continue
        before = buffer
        if isinstance(buffer, Blocks):
            codes, scales = buffer.codes, buffer.scales
            if codes.dtype != torch.int8 or scales.dtype != torch.float32:
                return False
            if not (_is_plain(codes, n, device) and _is_plain(scales, -(-n // BLOCK), device)):
                return False
        elif buffer.dtype not in _EXACT or not _is_plain(buffer, n, device):
            return False
    return scale is None or (scale.dtype == torch.float32 and _is_plain(scale, 1, device))


def _is_plain(x: Tensor, size: int, device: torch.device) -> bool:
    is_like = x.numel() == size and x.dim() == 1 and x.device == device and x.is_contiguous()
    return is_like and x.data_ptr() != 0


def check_pass(given: Pass) -> None:
    """Raise ValueError with what is wrong, if anything is."""
    values = tensors(given.residual)[0] if given.grad_N is None else given.grad_N
    n, device, dtype = values.numel(), values.device, arithmetic_dtype(given)
    stored = (given.residual, given.old_residual, given.velocity, given.old_velocity)
    for name, buffer in zip(_STORED, stored, strict=True):
        if buffer is not None:
            _check_buffer(name, buffer, n, device, _ALLOWED[dtype])
    if given.grad_N is None:
        _check_in_place(*stored, given.selection)
    else:
        check_tensor("grad", given.grad_N, device, STEP_DTYPES, 1)
    if given.scale is not None:
        check_shape("scale", given.scale, (1,), device, (dtype,))


def check_lagging_pass(given: Pass) -> None:
    """Raise ValueError with what is wrong, if anything is."""
    grad_N = given.grad_N
    n, device = grad_N.numel(), grad_N.device
    check_tensor("grad", grad_N, device, STEP_DTYPES, 1)
    exact = state_dtype(grad_N.dtype)
    for name in ("residual", "velocity", "old_velocity"):
        check_part(name, getattr(given, name), (exact,), n, device)
    if given.scale is not None:
        check_shape("scale", given.scale, (1,), device, (exact,))


def _check_in_place(
    residual: Buffer,
    old_residual: Buffer | None,
    velocity: Buffer | None,
    old_velocity: Buffer | None,
    selection: Selection | None,
) -> None:
    for name, new, old in (
        ("old_residual", residual, old_residual),
        ("old_velocity", velocity, old_velocity),
    ):
        if old is not None and (new is None or tensors(new)[0] is not tensors(old)[0]):
            raise ValueError(f"{name} is another buffer; allowed without a gradient: the same")
    if selection is None:
        raise ValueError("neither a gradient nor a selection; give one")


def _check_buffer(
    name: str,
    buffer: Buffer,
    n: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if isinstance(buffer, Blocks):
        check_part(f"{name}.codes", buffer.codes, (torch.int8,), n, device)
        check_part(f"{name}.scales", buffer.scales, (torch.float32,), -(-n // BLOCK), device)
    else:
        check_part(name, buffer, dtypes, n, device)


def check_part(
    name: str, part: Tensor, dtypes: tuple[torch.dtype, ...], size: int, device: torch.device
) -> None:
    """Raise ValueError for a tensor that is not (size,), of one of these dtypes, on this device."""
    check_tensor(name, part, device, dtypes, 1)
    if part.numel() != size:
        raise ValueError(f"{name} has {part.numel()} elements; allowed: {size}")
