"""Read and check the gradient that a step takes for a parameter: dense, of rows or of elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from parsimony_kernels.runtime.checks import check_elements
from parsimony_kernels.runtime.operands import STEP_DTYPES, state_dtype


@dataclass(frozen=True)
class Gradient:
    """A gradient: of the whole parameter, of some rows, or of some elements.

    rows: indices along the parameter's first axis, to which the values belong.
    indices: of elements of the flattened parameter, to which the values belong.
    rest_is_unknown: True: nothing is known of the other rows or elements, so they and their state
        are not changed. False: the other elements of the gradient are 0.
    """

    values: Tensor
    rows: Tensor | None = None
    indices: Tensor | None = None
    rest_is_unknown: bool = True

    @property
    def is_dense(self) -> bool:
        return self.rows is None and self.indices is None


def check_parameter(p: Tensor) -> None:
    if p.dtype not in STEP_DTYPES or p.layout != torch.strided:
        allowed = ", ".join(map(str, STEP_DTYPES))
        whose = "an uninitialized parameter" if is_lazy(p) else f"a parameter of {tuple(p.shape)}"
        raise ValueError(
            f"{whose} is {p.layout} {p.dtype}; allowed: dense and "
            f"{allowed}. Give others to an optimizer of torch.optim"
        )


def read_gradient(p: Tensor, elements: tuple[Tensor, Tensor] | None) -> Gradient | None:
    """Return the gradient that arrived for a parameter, coalesced; None if there is none.

    Args: elements: indices (k,) int64, ascending and unique, and values (k,) in the dtype of the
        parameter's state; None: the gradient is p.grad.
    """
    if elements is not None:
        if p.grad is not None:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} has elements and a .grad; "
                             "allowed: one of them")  # fmt: skip
        indices, values = elements
        check_elements(values, indices, p)
        return Gradient(values, indices=indices, rest_is_unknown=False)
    grad = p.grad
    if grad is None:
        return None
    grad = grad.detach()
    if grad.shape != p.shape or grad.dtype != p.dtype:
        raise ValueError(
            f"grad is {tuple(grad.shape)} {grad.dtype}; allowed: {tuple(p.shape)} {p.dtype}, "
            f"as the parameter"
        )
    return _read_sparse(p, grad) if grad.is_sparse else Gradient(grad)


def _read_sparse(p: Tensor, grad: Tensor) -> Gradient:
    if grad.sparse_dim() not in (1, p.dim()):
        raise ValueError(
            f"grad of shape {tuple(p.shape)} has {grad.sparse_dim()} sparse dimensions; allowed: 1 "
            f"(rows) or {p.dim()} (elements). Use a dense gradient (grad.to_dense())"
        )
    grad = grad.coalesce()
    positions, values = grad.indices(), grad.values()
    if p.dim() > 1 and grad.sparse_dim() == 1:
        return Gradient(values, rows=positions[0])
    flat = torch.zeros_like(positions[0])
    for size, position in zip(p.shape, positions, strict=True):
        flat = flat * size + position
    return Gradient(values.to(state_dtype(p.dtype)), indices=flat)
