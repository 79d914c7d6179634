"""The operations in plain torch: the specification, and the implementation for any device.

Every product, sum, root and quotient is float32 and rounded by itself. Values of rows that share a
bucket are added in the order of the rows; the means of Factored are taken in float64. The native
implementations equal this one to the bit, except for Factored, where sums have another order.
Only this one steps float64 parameters; all else is float64 then, the rule's scalars too.
A gradient that is NaN or infinite makes what it touches NaN or infinite in all implementations, and
what shares state with that; nothing hides it. (NaNs may differ in their bits.)
Temporary tensors here are as large as the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from parsimony_kernels.runtime.operands import (
    Cover,
    Factored,
    First,
    Full,
    MomentOfUpdates,
    Rule,
    Second,
    Table,
    state_dtype,
)
from parsimony_kernels.step.observing import Observation
from parsimony_kernels.step.reference_sketch import Cells, ordered_sum
from parsimony_kernels.step.roots import Root

# ---- sketches ------------------------------------------------------------------------------------


def sketch_insert(table: Table, rows: Tensor, values: Tensor) -> None:
    Cells(table, rows).update(values, 1.0, 0.0)


def sketch_query(table: Table, rows: Tensor) -> Tensor:
    return Cells(table, rows).query()


def sketch_query_elements(table: Table, indices: Tensor) -> Tensor:
    dim = table.values.shape[2]
    return Cells(table, indices // dim, indices % dim).query()


def sketch_update(
    table: Table, rows: Tensor, values: Tensor, gain: float, forgetting: float
) -> None:
    Cells(table, rows).update(values, gain, forgetting)


# ---- steps ---------------------------------------------------------------------------------------


def step(
    param: Tensor, grad: Tensor, rule: Rule, first: First, second: Second, rows: Tensor | None
) -> None:
    is_dense = rows is None
    rows = torch.arange(len(param), device=param.device) if rows is None else rows
    p = param[rows].to(state_dtype(param.dtype))
    g = _oriented(grad.to(p.dtype), p, rule)
    numerator = _first_moment(first, g, rows, rule, len(g) == len(param))
    match second:
        case Full():
            nu = second.values[rows] = _average(second.values[rows], g, rule)
        case Cover():
            nu = _cover_rows(second, g, rows, is_dense, rule)
        case Factored():
            nu = _factored_rows(second, g, rows, is_dense, rule)
        case Table():
            nu = _sketched(Cells(second, rows), g, rule)
        case None:
            nu = None
    update = _update_moment(first, _preconditioned(numerator, nu, rule), rows, rule)
    param[rows] = (p * rule.param_scale - update * rule.lr).to(param.dtype)


def observe(given: Sequence[Observation]) -> None:
    for observed, grad, rule, scale in given:
        _observe(grad, rule, observed.second, scale)


def _observe(grad: Tensor, rule: Rule, second: Second, scale: Tensor | None) -> None:
    g = grad.to(state_dtype(grad.dtype))
    if scale is not None:
        g = g * scale
    rows = torch.arange(len(g), device=g.device)
    match second:
        case Full():
            second.values.copy_(_average(second.values, g, rule))
        case Cover():
            _cover_rows(second, g, rows, True, rule)
        case Factored():
            _factored_rows(second, g, rows, True, rule)
        case Table():
            Cells(second, rows).update(_square(g, rule), 1.0, rule.second_forgetting)


def step_elements(
    param: Tensor, values: Tensor, indices: Tensor, rule: Rule, first: First, second: Second
) -> None:
    flat = param.view(-1)
    i, j = indices // param.shape[1], indices % param.shape[1]
    p = flat[indices].to(state_dtype(param.dtype))
    g = _oriented(values, p, rule)
    numerator = _first_moment(first, g, (i, j), rule, len(g) == param.numel())
    match second:
        case Full():
            nu = second.values[i, j] = _average(second.values[i, j], g, rule)
        case Cover():
            nu = _cover_elements(second, g, i, j, rule)
        case Factored():
            nu = _factored_elements(second, g, i, j, rule)
        case Table():
            nu = _sketched(Cells(second, i, j), g, rule)
        case None:
            nu = None
    update = _update_moment(first, _preconditioned(numerator, nu, rule), (i, j), rule)
    flat[indices] = (p * rule.param_scale - update * rule.lr).to(param.dtype)


def _oriented(g: Tensor, p: Tensor, rule: Rule) -> Tensor:
    g = g * rule.sign
    return g + p * rule.weight_decay if rule.weight_decay else g


def _square(g: Tensor, rule: Rule) -> Tensor:
    """Return what a gradient adds to its second moment; in torch's order, or g * g overflows."""
    return (g * rule.second_gain) * g


def _average(old: Tensor, g: Tensor, rule: Rule) -> Tensor:
    return old * rule.second_beta + _square(g, rule)


def _preconditioned(numerator: Tensor, nu: Tensor | None, rule: Rule) -> Tensor:
    if nu is None:
        return numerator
    # sqrt(scale nu + eps_inside), of which the scaled moment could overflow; MKL's root is inexact
    inside = (nu + rule.eps_inside / rule.second_scale).double().sqrt().to(nu.dtype)
    root = inside * math.sqrt(rule.second_scale) + rule.eps_outside
    quotient = numerator / root
    bounded = quotient.clamp(-rule.largest_quotient, rule.largest_quotient)
    bounded = torch.where(root == 0, torch.zeros_like(root), bounded)
    return torch.where(numerator.isfinite(), bounded, quotient)


def _first_moment(first: First, g: Tensor, at, rule: Rule, is_whole: bool) -> Tensor:
    """Feed the gradient to its first moment and return what the update takes for that, scaled.

    is_whole: all rows, or elements, have arrived.
    """
    match first:
        case Full():
            m = first.values[at] = first.values[at] * rule.first_beta + g * rule.first_gain
            return m * rule.first_scale
        case Table():
            cells = Cells(first, *at) if isinstance(at, tuple) else Cells(first, at)
            taken = _sketched_first(cells.candidates(), g, rule)
            forgetting, keep = (0.0, rule.first_beta) if is_whole else (rule.first_forgetting, 1.0)
            cells.update(g, rule.first_gain, forgetting, keep)
            return taken
        case _:
            return g


def _sketched_first(candidates: Tensor, g: Tensor, rule: Rule) -> Tensor:
    """Return what the update takes for a first moment with these estimates before this step.

    That which follows from their mean, as far as they agree, and for the rest the entry's own
    gradient, with the weight that it gets in the long run. See Rule.
    """
    depth, first = len(candidates), candidates[0]
    mean = first + sum(x - first for x in candidates[1:]) * (1 / depth)
    squares = sum((x - mean) * (x - mean) for x in candidates)
    doubt = squares * (1 / max(1, depth * (depth - 1))) * rule.first_doubt * (depth > 1)
    square = mean * mean
    known = (1 - doubt / square).nan_to_num(0.0).clamp_min(0)
    known = torch.where(square > 0, known, (~(doubt > 0)).to(g.dtype))
    moment = (mean * rule.first_beta + g * rule.first_gain) * rule.first_scale
    weight = rule.first_gain / rule.first_forgetting if rule.first_forgetting else rule.first_gain
    return known * moment + (1 - known) * (g * weight)


def _update_moment(first: First, update: Tensor, at, rule: Rule) -> Tensor:
    if not isinstance(first, MomentOfUpdates):
        return update
    u = first.values[at] = first.values[at] * rule.first_beta + update * rule.first_gain
    return u


def _sketched(cells: Cells, g: Tensor, rule: Rule) -> Tensor:
    """Feed a second moment's sketch; return what the update takes for the moment.

    That which follows from the estimate before this step, of which the insertion knows nothing yet:
    the entry's own square counts as in an exact moment, not as one of many in a bucket.
    """
    nu = _average(cells.query(), g, rule)
    cells.update(_square(g, rule), 1.0, rule.second_forgetting)
    return nu


# ---- covers --------------------------------------------------------------------------------------


def _cover_rows(cover: Cover, g: Tensor, rows: Tensor, is_dense: bool, rule: Rule) -> Tensor:
    row, col = cover.row[rows], cover.col
    if cover.variant == "I":
        square = _square(g, rule)
        row = row * rule.second_beta + square.amax(1)
        new_col = col * rule.second_beta + square.amax(0)
    else:
        prior = torch.minimum(row[:, None], col) if is_dense else row[:, None]
        nu = _average(prior, g, rule)
        row, new_col = nu.amax(1), nu.amax(0)
    cover.row[rows] = row
    cover.col.copy_(new_col if is_dense else torch.maximum(col, new_col))
    if cover.variant == "II":
        return nu
    return torch.minimum(row[:, None], cover.col) if is_dense else row[:, None].expand_as(g)


def _cover_elements(cover: Cover, g: Tensor, i: Tensor, j: Tensor, rule: Rule) -> Tensor:
    if cover.variant == "I":
        for accumulator, at in ((cover.row, i), (cover.col, j)):
            accumulator.scatter_reduce_(0, at, _average(accumulator[at], g, rule), "amax")
        return torch.minimum(cover.row[i], cover.col[j])
    nu = _average(torch.minimum(cover.row[i], cover.col[j]), g, rule)
    cover.row.scatter_reduce_(0, i, nu, "amax")
    cover.col.scatter_reduce_(0, j, nu, "amax")
    return nu


# ---- factored means ------------------------------------------------------------------------------


def relative(col: Tensor) -> Tensor:
    """Return the columns as multiples of their mean, which is also the mean of the rows.

    0 before the first gradient; NaN where the mean is not finite, as it says nothing of any entry.
    """
    mean = col.double().mean().to(col.dtype)
    return torch.where(mean <= 0, torch.zeros_like(col), col / mean + (mean - mean))


def roots(asked: Sequence[Root], positions_K: Tensor) -> Tensor:
    parts = zip(asked, positions_K.split([root.count for root in asked]), strict=True)
    return torch.cat([_root(root, positions - root.first) for root, positions in parts])


def _root(root: Root, indices_K: Tensor) -> Tensor:
    second = root.second
    if isinstance(second, Full):
        nu = second.values.view(-1)[indices_K]
    else:
        row, col = second.row[indices_K // len(second.col)], indices_K % len(second.col)
        is_factored = isinstance(second, Factored)
        nu = row * relative(second.col)[col] if is_factored else torch.minimum(row, second.col[col])
    return sqrt_(nu.add_(root.inside)).mul_(root.scale).add_(root.outside)


def sqrt_(x: Tensor) -> Tensor:
    return x.copy_(x.double().sqrt())  # MKL's root is inexact


def _factored_rows(
    factored: Factored, g: Tensor, rows: Tensor, is_dense: bool, rule: Rule
) -> Tensor:
    row, col, square = factored.row[rows], factored.col, _square(g, rule).double()
    mean = square.mean(1).to(g.dtype)
    if is_dense:
        new_col = col * rule.second_beta + square.mean(0).to(g.dtype)
    else:
        estimate = row[:, None] * relative(col)
        change = (square - estimate.double() * rule.second_forgetting).sum(0)
        new_col = (col + (change / len(factored.row)).to(col.dtype)).clamp_min(0)
    row = row * rule.second_beta + mean
    factored.row[rows] = row
    factored.col.copy_(new_col)
    return row[:, None] * relative(new_col)


def _factored_elements(factored: Factored, g: Tensor, i: Tensor, j: Tensor, rule: Rule) -> Tensor:
    row, col = factored.row, factored.col
    estimate = row[i] * relative(col)[j]
    change = _square(g, rule).double() - estimate.double() * rule.second_forgetting
    for means, at, num_averaged in ((row, i, len(col)), (col, j, len(row))):
        unique, sums, _ = ordered_sum(at, change)
        means[unique] = (means[unique] + (sums / num_averaged).to(means.dtype)).clamp_min(0)
    return row[i] * relative(col)[j]
