"""How velocities and residuals are stored: in which dtype, and in a state that is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from dgc.worker.elements import TensorSpec
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Blocks, Buffer, Correction

KINDS = ("velocity", "residual")


def exact(dtype: torch.dtype) -> str:
    """Return as what gradients of this dtype are stored without loss."""
    return "float64" if dtype == torch.float64 else "float32"


def rounded(values_N: Tensor, dtype: str, key: int) -> Buffer:
    """Return a buffer of this dtype with these values, rounded stochastically."""
    buffer = buffers.empty(values_N.numel(), dtype, values_N.device)
    buffers.accumulate(values_N, Correction(), residual=buffer, old_residual=None, key=key)
    return buffer


# ---- saved ---------------------------------------------------------------------------------------


def to_state(buffer: Buffer) -> Tensor | dict[str, Tensor]:
    """Return what is saved of a buffer: its own memory."""
    if isinstance(buffer, Blocks):
        return {"codes": buffer.codes, "scales": buffer.scales}
    return buffer


def from_state(saved: Tensor | dict[str, Tensor], device: torch.device) -> Buffer:
    """Return a buffer on a device, a copy of what was saved."""
    if isinstance(saved, dict):
        return Blocks(*(saved[part].to(device, copy=True) for part in ("codes", "scales")))
    return saved.to(device, copy=True)


def decoded(saved: Tensor | dict[str, Tensor]) -> Tensor:
    """Return the values (N,) of what was saved, in float32 or float64."""
    return buffers.decode(from_state(saved, torch.device("cpu")))


def loaded(kind: str, saved: Tensor | dict[str, Tensor], spec: TensorSpec, dtype: str) -> Buffer:
    """Return a tensor's buffer, a copy of what was saved.

    Raises: ValueError if it is of another size, or not of this dtype.
    """
    buffer = from_state(saved, spec.device)
    if buffers.numel(buffer) != spec.numel:
        raise ValueError(
            f"the {kind} of {spec.name} was saved with {buffers.numel(buffer)} elements; "
            f"allowed: {spec.numel}"
        )
    if buffers.dtype_of(buffer) != dtype:
        raise ValueError(
            f"the {kind} of {spec.name} was saved as {buffers.dtype_of(buffer)}; allowed: "
            f"{dtype}, by {kind}_dtype and the parameter's dtype here"
        )
    return buffer
