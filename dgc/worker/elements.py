"""A tensor as it is exchanged: its real elements in the order of indices, float32 or float64.

Owns: which dtypes are exchanged, and the way from a gradient to its elements and from elements to a
gradient of a parameter, whatever the strides. A complex tensor's elements are real and imaginary
parts in turn. Refuses dtypes that none of this would keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parsimony_kernels.runtime.operands import STEP_DTYPES, state_dtype

DTYPES = (*STEP_DTYPES, torch.complex64, torch.complex128)
_LARGEST_FLOAT16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to exchange.

    numel: the elements whose exchange is this rank's affair: all, or in two levels its share of
    them, of which the last is padded. whole: all. compressible: it may be sent sparsely.
    row_size: elements of a row if its gradient is row-sparse, else 0.
    dtype: of the elements as they are accumulated and exchanged, float32 or float64. A complex
    tensor's are its real and imaginary parts in turn: two to one of its own.
    """

    name: str
    numel: int
    device: torch.device
    compressible: bool
    whole: int = 0
    row_size: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", self.whole or self.numel)


def check_dtype(name: str, parameter: Tensor) -> None:
    if parameter.dtype not in DTYPES:
        allowed = ", ".join(map(str, DTYPES)).replace("torch.", "")
        raise ValueError(
            f"{name} is {parameter.dtype}, whose gradients are not exchanged; allowed: {allowed}. "
            f"Train a copy of one of these, or leave it out of the optimizer"
        )


def element_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's elements on their way."""
    return state_dtype(parameter.dtype.to_real())


def num_elements(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def to_reals(tensor: Tensor) -> Tensor:
    """View a complex tensor (...) as its parts (..., 2), others as they are; whether it is a
    conjugate or negated view does not matter, and is not to be seen in the result."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def flattened(grad: Tensor) -> Tensor:
    """Return a dense gradient's elements (N,), contiguous: a view of it if its strides allow it."""
    if grad.is_complex() or grad.is_neg():
        grad = to_reals(grad)
    return grad.view(-1) if grad.is_contiguous() else grad.reshape(-1).contiguous()


def rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sparse gradient's row numbers (K,), ascending, and the elements of its rows (K, M).

    Of one of single elements (`to_sparse()` makes such): the rows that have any, in full.
    """
    grad = grad.coalesce()  # returns the same tensor if it is coalesced already
    indices, values = grad.indices(), grad.values()
    rows_K = indices[0]
    if grad.sparse_dim() > 1:
        rows_K, row_of = rows_K.unique(return_inverse=True)
        elements = values.new_zeros(rows_K.numel(), *grad.shape[1:])
        values = elements.index_put_((row_of, *indices[1:]), values)
    values = to_reals(values)
    row_size = math.prod(grad.shape[1:]) * (2 if grad.is_complex() else 1)
    return rows_K, values.reshape(rows_K.numel(), row_size).contiguous()


def gradient_of(parameter: Tensor, mean_N: Tensor) -> Tensor:
    """Return elements (N,) as a dense gradient, in the parameter's dtype, shape and strides.

    Of strides: torch's fused optimizers go through both memories at once. A copy is made only if
    dtype or order are others.
    """
    values_N = mean_N
    if mean_N.dtype != parameter.dtype:
        values_N = _of_its_dtype(parameter, mean_N)
    # The strides of axes of length 1 are arbitrary: take the parameter's.
    if parameter.is_contiguous():
        return values_N.as_strided(parameter.shape, parameter.stride())
    grad = torch.empty_like(parameter, memory_format=torch.preserve_format)
    # It has gaps, or elements in the same place: do as torch's own gradients do.
    if grad.stride() != parameter.stride():
        return values_N.view(parameter.shape)
    return grad.copy_(values_N.view(parameter.shape))


def row_gradient_of(parameter: Tensor, rows_K: Tensor, means_KM: Tensor) -> Tensor:
    """Return rows as a sparse gradient in the parameter's dtype and shape."""
    values = _of_its_dtype(parameter, means_KM.reshape(-1)).view(-1, *parameter.shape[1:])
    return torch.sparse_coo_tensor(
        rows_K[None], values, parameter.shape, is_coalesced=True, check_invariants=False,
        device=values.device,
    )  # fmt: skip


def _of_its_dtype(parameter: Tensor, values: Tensor) -> Tensor:
    """Return values (N,) in a parameter's dtype: reals, or pairs of them as complex numbers."""
    if parameter.is_complex():
        # A tensor before it in the bucket had an odd number of elements.
        if values.storage_offset() % 2:
            values = values.clone()
        values = torch.view_as_complex(values.view(-1, 2))
    if parameter.dtype == torch.float16:
        values = values.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return values.to(parameter.dtype)
