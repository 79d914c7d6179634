"""Update one parameter, of any shape, by the kernel's step on matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.gradients import Gradient
from optim.matrix import balanced_split, matrix_shape
from optim.moments import Moment
from parsimony_kernels.step import ops


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured: it would repeat this step's rate and bias correction "
            "in every replay; capture forward and backward, and call step() outside of the graph"
        )


def matrices(
    p: Tensor, moments: tuple[Moment | None, ...], *, any_split: bool = True
) -> tuple[Tensor, int]:
    """Return a contiguous parameter as the matrix that its step takes, and that matrix's split."""
    any_split = any_split and all(moment.any_split for moment in moments if moment)
    split = balanced_split(tuple(p.shape)) if any_split else 1
    return p.view(matrix_shape(tuple(p.shape), split)), split


def update(
    p: Tensor, gradient: Gradient, rule: ops.Rule, moments: tuple[Moment | None, ...]
) -> None:
    """Update the parameter and its moments, (first, second), in place."""
    if gradient.indices is not None and gradient.rest_is_unknown:
        moments = tuple(m and m.for_elements(gradient.indices) for m in moments)
    target, values = p.contiguous(), gradient.values.contiguous()
    matrix, split = matrices(target, moments, any_split=gradient.rows is None)
    first, second = (m and m.operand(split) for m in moments)
    if gradient.indices is None:
        values = values.view(-1, matrix.shape[1])
        ops.step(matrix, values, rule, first=first, second=second, rows=gradient.rows)
    else:
        ops.step_elements(matrix, values, gradient.indices, rule, first=first, second=second)
    for moment, operand in zip(moments, (first, second), strict=True):
        if moment is not None:
            moment.write_back(operand, split, is_dense=gradient.is_dense)
    if target.data_ptr() != p.data_ptr():
        p.copy_(target)
    torch.autograd.graph.increment_version(p)  # autograd does not see what a native kernel writes
