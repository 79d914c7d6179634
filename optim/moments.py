"""The structures in which a moment of a parameter is kept: full, cover, factored means or sketch.

All four have one interface, so that an optimizer does not know which one it uses. A moment wraps
plain tensors that lie under their names in `optimizer.state[p]`, so that checkpoints hold only
tensors.

Shapes: a parameter is seen as a matrix (n, m): see optim.matrix for `split`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from optim.matrix import matrix_shape
from optim.sketch import CountMinSketch, CountSketch, hash_seeds, width_for
from parsimony_kernels.runtime import operands
from parsimony_kernels.step import ops
from parsimony_kernels.step.reference import relative

SEEDS = "_seeds"  # ends the names of tensors with hash seeds, which stay on the CPU
_LARGEST_FACTORED = 16.0  # normal gradients reach 5 in large matrices, 14 in tiny ones' first step


class Spec(NamedTuple):
    """Which moment it is, of which parameter."""

    name: str  # of its tensor in the state, or the beginning of its tensors' names
    shape: tuple[int, ...]  # of the parameter
    device: torch.device
    dtype: torch.dtype  # of the state
    is_first: bool  # a first moment has both signs, a second one has none below 0
    follows_update: bool  # a first moment of updates that the second one has divided already
    seed_key: tuple[int, ...]  # what the hashes of a sketch depend on
    options: Mapping[str, Any]  # of the parameter's group


def count_of_steps() -> Tensor:
    """Return a parameter's `step`, 0. It lies on the CPU, so that no device is waited for."""
    return torch.zeros((), dtype=torch.float32, device="cpu")


class Moment(ABC):
    """A moment kept in tensors of a parameter's state; those missing in `state` are made, as 0."""

    any_split: ClassVar[bool] = True  # False: the rows of the matrix must be the first axis
    has_ends: ClassVar[bool] = False  # whether `end_step` does something

    def __init__(self, spec: Spec, state: dict[str, Tensor]) -> None:
        self.spec = spec
        names = self.names()
        if not state.keys() >= set(names):
            state.update(self.zeros())
        for name in names:
            if name.endswith(SEEDS):
                continue
            if state[name].device != spec.device or state[name].dtype != spec.dtype:
                state[name] = state[name].to(spec.device, spec.dtype)  # as the parameter's now are
        self.tensors = {name: state[name] for name in names}

    @abstractmethod
    def names(self) -> tuple[str, ...]: ...

    @abstractmethod
    def zeros(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def operand(self, split: int) -> Any:
        """Return the moment in the form that parsimony_kernels.step.ops takes."""

    def is_view(self, split: int) -> bool:
        """Tell whether a dense step of the operand changes the tensors, with nothing to copy."""
        return True

    def write_back(self, operand: Any, split: int, *, is_dense: bool) -> None:  # noqa: B027
        """Copy what a step changed in `operand` to the tensors, if it is not a view of them."""

    def for_elements(self, indices_K: Tensor) -> Moment:
        """Return the moment to use for elements (K,) of a gradient whose rest is unknown."""
        return self

    def end_step(self, step: int, options: Mapping[str, Any]) -> None:  # noqa: B027
        """Do what is due after the parameter's `step`-th step, counted from 1."""

    @abstractmethod
    def estimate(self) -> Tensor:
        """Return the moment of every element, as a new tensor in the parameter's shape."""

    @abstractmethod
    def at(self, indices_K: Tensor) -> Tensor:
        """Return the moment of the elements (K,) int64 of the flattened parameter: (K,)."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.spec.dtype, device=self.spec.device)


class Full(Moment):
    """One number for each element, as torch.optim keeps it."""

    def names(self) -> tuple[str, ...]:
        return (self.spec.name,)

    def zeros(self) -> dict[str, Tensor]:
        return {self.spec.name: self._zeros(*self.spec.shape)}

    def operand(self, split: int) -> operands.Full | operands.MomentOfUpdates:
        kind = operands.MomentOfUpdates if self.spec.follows_update else operands.Full
        return kind(self.tensors[self.spec.name].view(matrix_shape(self.spec.shape, split)))

    def estimate(self) -> Tensor:
        return self.tensors[self.spec.name].clone()

    def at(self, indices_K: Tensor) -> Tensor:
        return self.tensors[self.spec.name].view(-1)[indices_K]


class Cover(Moment):
    """SM3's accumulators: one for each axis, shaped (1, .., n_k, .., 1).

    Source: Anil et al. 2019 (arXiv:1901.11150).
    A kernel sees a matrix with one accumulator for rows and one for columns: each is the minimum of
    the accumulators of the axes that form the rows, or the columns.
    Differs: in variant I, a tensor of more than two axes has two accumulators: one of the first
    axis, shaped (n, 1, ..), and one of all the other axes together, shaped (1, ..). Its
    accumulators are sums, which a minimum over several axes would change.
    """

    def __init__(self, spec: Spec, state: dict[str, Tensor]) -> None:
        self.variant = spec.options.get("variant", "II")
        self.any_split = self.variant == "II"
        super().__init__(spec, state)

    def names(self) -> tuple[str, ...]:
        count = len(self.spec.shape) if self.variant == "II" else 2
        return tuple(f"accumulator_{k}" for k in range(count))

    def zeros(self) -> dict[str, Tensor]:
        shape, dim = self.spec.shape, len(self.spec.shape)
        axes = [(k, k + 1) for k in range(dim)] if self.variant == "II" else [(0, 1), (1, dim)]
        shapes = [[n if a <= k < b else 1 for k, n in enumerate(shape)] for a, b in axes]
        return {n: self._zeros(*shape) for n, shape in zip(self.names(), shapes, strict=True)}

    def operand(self, split: int) -> operands.Cover:
        (row, _), (col, _) = self._sides(split)
        return operands.Cover(_merged(row).view(-1), _merged(col).view(-1), self.variant)

    def is_view(self, split: int) -> bool:
        return all(len(views) == 1 for views, _ in self._sides(split))

    def write_back(self, operand: operands.Cover, split: int, *, is_dense: bool) -> None:
        sides = zip(self._sides(split), (operand.row, operand.col), strict=True)
        for (views, shape), merged in sides:
            if len(views) == 1:
                continue  # the kernel has written to this accumulator itself
            for k, view in enumerate(views):
                others = [axis for axis in range(len(shape)) if axis != k]
                largest = merged.view(shape).amax(others, keepdim=True)
                view.copy_(largest if is_dense else torch.maximum(view, largest))

    def for_elements(self, indices_K: Tensor) -> Cover:
        return _RowCover(self.spec, self.tensors, indices_K)

    def estimate(self) -> Tensor:
        return _merged(list(self.tensors.values())).expand(self.spec.shape).clone()

    def at(self, indices_K: Tensor) -> Tensor:
        coordinates = _coordinates(indices_K, self.spec.shape)
        parts = [
            t[tuple(x if n > 1 else 0 * x for x, n in zip(coordinates, t.shape, strict=True))]
            for t in self.tensors.values()
        ]
        return _merged(parts)

    def _sides(self, split: int) -> list[tuple[list[Tensor], tuple[int, ...]]]:
        """Return (accumulators, sizes of their axes) of the rows, and of the columns."""
        tensors, shape = list(self.tensors.values()), self.spec.shape
        rows = [t.view(t.shape[:split]) for t in tensors[:split]]
        cols = [t.view(t.shape[split:]) for t in tensors[split:]]
        return [(rows, shape[:split]), (cols, shape[split:])]


def _coordinates(indices_K: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Do as torch.unravel_index, which copies the sizes to a GPU and so waits for it."""
    found = []
    for size in reversed(shape):
        found.append(indices_K % size)
        indices_K = indices_K // size
    return found[::-1]


class _RowCover(Cover):
    """A cover for elements of a sparse gradient, which read the first axis' accumulator alone.

    A gradient of rows does the same. The other accumulators rise to the highest one of the rows
    that arrived, so that they still bound every element.
    """

    def __init__(self, spec: Spec, state: dict[str, Tensor], indices_K: Tensor) -> None:
        super().__init__(spec, state)
        self.any_split = False
        self.rows_K = indices_K // matrix_shape(spec.shape, 1)[1]

    def operand(self, split: int) -> operands.Cover:
        cover = super().operand(split)
        return replace(cover, col=torch.full_like(cover.col, math.inf))

    def write_back(self, operand: operands.Cover, split: int, *, is_dense: bool) -> None:
        highest = operand.row[self.rows_K].amax()
        for accumulator in list(self.tensors.values())[1:]:
            accumulator.copy_(torch.maximum(accumulator, highest))


class Factored(Moment):
    """Row means (n,) and column means (m,); the estimate is row x col / mean(col).

    Source: Shazeer and Stern 2018 (arXiv:1804.04235), algorithm 2. Differs: no eps is added to the
    squares; parsimony_kernels.step.ops.step says how a sparse gradient changes the means.
    """

    any_split = False

    def names(self) -> tuple[str, ...]:
        return f"{self.spec.name}_row", f"{self.spec.name}_col"

    def zeros(self) -> dict[str, Tensor]:
        sizes = matrix_shape(self.spec.shape, 1)
        return {name: self._zeros(size) for name, size in zip(self.names(), sizes, strict=True)}

    def operand(self, split: int) -> operands.Factored:
        return operands.Factored(*self.tensors.values())

    def estimate(self) -> Tensor:
        row, col = self.tensors.values()
        return (row[:, None] * relative(col)).view(self.spec.shape)

    def at(self, indices_K: Tensor) -> Tensor:
        row, col = self.tensors.values()
        return row[indices_K // len(col)] * relative(col)[indices_K % len(col)]


def factored_bound(exact: float, unit: float = 1.0) -> dict[str, float]:
    """Return the rule's bound of gradients divided by the root of a factored moment.

    After one entry with a huge gradient, the estimates of the other entries are almost 0 until the
    means forget it, and their gradients would be divided by little more than eps.
    Args: exact: the largest quotient that the element's exact moment allows. The bound is at least
            that, and at least what ordinary matrices reach.
        unit: the quotient of a gradient that equals all those before it.
    """
    return {"largest_quotient": max(exact, _LARGEST_FACTORED * unit)}


class Sketch(Moment):
    """A sketch over the rows: a CountSketch for a first moment, a CountMinSketch for a second."""

    any_split = False
    has_ends = True

    def names(self) -> tuple[str, ...]:
        return self.spec.name, f"{self.spec.name}{SEEDS}"

    def zeros(self) -> dict[str, Tensor]:
        num_rows, dim = matrix_shape(self.spec.shape, 1)
        depth, size_ratio, width = (self.spec.options[k] for k in ("depth", "size_ratio", "width"))
        width = width or width_for(num_rows, depth, size_ratio)
        seeds = hash_seeds(depth, *self.spec.seed_key)
        return dict(zip(self.names(), (self._zeros(depth, width, dim), seeds), strict=True))

    @property
    def sketch(self) -> CountSketch | CountMinSketch:
        kind = CountSketch if self.spec.is_first else CountMinSketch
        return kind.wrap(*self.tensors.values())

    def operand(self, split: int) -> operands.Table:
        return self.sketch.table

    def end_step(self, step: int, options: Mapping[str, Any]) -> None:
        if self.is_to_clean(step, options):
            self.sketch.clean(options["clean_factor"])

    def is_to_clean(self, step: int, options: Mapping[str, Any]) -> bool:
        interval = options.get("clean_interval")
        return bool(interval) and step % interval == 0

    def estimate(self) -> Tensor:
        rows = torch.arange(self.spec.shape[0], device=self.spec.device)
        return self.sketch.query(rows).view(self.spec.shape)

    def at(self, indices_K: Tensor) -> Tensor:
        return ops.sketch_query_elements(self.sketch.table, indices_K)


STRUCTURES: dict[str, type[Moment]] = {
    "full": Full, "cover": Cover, "factored": Factored, "sketch": Sketch,
}  # fmt: skip


def _merged(accumulators: list[Tensor]) -> Tensor:
    """Return the broadcast minimum of accumulators; of a single one, the accumulator itself."""
    merged = accumulators[0]
    for accumulator in accumulators[1:]:
        merged = torch.minimum(merged, accumulator)
    return merged
