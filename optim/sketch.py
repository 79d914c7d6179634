"""CountSketch and CountMinSketch: sketches over the rows of a matrix, as value types.

Source: Spring et al. 2019 (PMLR 97), after Charikar et al. 2002 and Cormode and Muthukrishnan 2005.
A sketch has `depth` tables of `width` buckets. Row i of the matrix is added to one bucket of each
table, which a hash chooses. The sketch holds `values` (depth, width, dim), float32 or float64, and
the hash's `seeds` (depth,) int64 on the CPU. This module decides sizes and seeds;
parsimony_kernels.step.ops has the hash and the arithmetic.

Shapes: k rows of `dim` columns are inserted or queried.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from optim import options
from parsimony_kernels.runtime import operands
from parsimony_kernels.step import ops


def width_for(num_rows: int, depth: int, size_ratio: float) -> int:
    """Return the width of a sketch of this size ratio. Example: 200, 3, 0.2 -> 13."""
    return max(1, round(size_ratio * num_rows / depth))


def hash_seeds(depth: int, *key: int) -> Tensor:
    """Return `depth` seeds, 0 or more, that depend only on the key, numbers below 2^32."""
    generator, state = torch.Generator("cpu"), 0
    drawn = partial(torch.randint, generator=generator, dtype=torch.int64, device="cpu")
    for part in key:
        generator.manual_seed(state ^ part)
        state = int(drawn(2**32, ()))
    return drawn(2**63 - 1, (depth,))


class _RowSketch:
    """What both sketches have in common.

    Args:
        num_rows: rows of the matrix, from which size_ratio gives the width; may be None if width is
            given.
        dim: columns of the matrix, and of every bucket.
        depth: number of tables, each with its own hash.
        size_ratio: size of the whole sketch, relative to num_rows x dim.
        width: buckets of a table; replaces size_ratio.
        seed: of the hashes. Only sketches with equal seeds can be merged.
        dtype: of the values and of the arithmetic: float32 or float64.
        device: of the values; None: the CPU, whatever torch's default device is.
    """

    signed: ClassVar[bool]

    def __init__(
        self,
        num_rows: int | None,
        dim: int,
        *,
        depth: int = 3,
        size_ratio: float = 0.2,
        width: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = {"dim": dim, "depth": depth, "size_ratio": size_ratio, "width": width}
        options.check({**sizes, "seed": seed, "dtype": dtype})
        if width is None:
            if num_rows is None:
                raise ValueError("neither num_rows nor width is given; give one of them")
            options.check({"num_rows": num_rows})
            width = width_for(num_rows, depth, size_ratio)
        self.values = torch.zeros(depth, width, dim, dtype=dtype, device=device or "cpu")
        self.seeds = hash_seeds(depth, seed)

    @classmethod
    def wrap(cls, values: Tensor, seeds: Tensor) -> Self:
        """Return a sketch that holds these very tensors, not copies."""
        sketch = cls.__new__(cls)
        sketch.values, sketch.seeds = values, seeds
        return sketch

    @property
    def table(self) -> operands.Table:
        """The sketch in the form that parsimony_kernels.step.ops takes."""
        return operands.Table(self.values, self.seeds, self.signed)

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """Add values (k, dim), in the sketch's dtype, to rows (k,) int64; rows may repeat."""
        ops.sketch_insert(self.table, rows, values)

    def query(self, rows: Tensor) -> Tensor:
        """Return the estimates (k, dim) of rows (k,) int64."""
        return ops.sketch_query(self.table, rows)

    def update(
        self, rows: Tensor, values: Tensor, *, gain: float = 1.0, decay: float = 0.0
    ) -> Tensor:
        """Insert gain * values - decay * query(rows), and return the new estimates (k, dim).

        Source: Spring et al. 2019, the query-then-insert of algorithms 2 to 4. For a sum, gain and
        decay have their defaults (3); for an average that forgets with beta, both are 1 - beta (4);
        for a momentum gamma, gain is 1 and decay 1 - gamma (2).
        Differs: see parsimony_kernels.step.ops.sketch_update. An optimizer's step inserts the same,
        but does not use the new estimates: see parsimony_kernels.step.ops.step.
        """
        ops.sketch_update(self.table, rows, values, gain=gain, forgetting=decay)
        return self.query(rows)

    def clean(self, factor: float) -> None:
        """Multiply all values by `factor`, so that what collisions have added up fades."""
        options.check({"clean_factor": factor})
        self.values.mul_(factor)

    def merge(self, other: Self) -> None:
        """Add another sketch; this one then holds the insertions of both."""
        if type(other) is not type(self):
            raise ValueError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        if other.values.shape != self.values.shape:
            shapes = tuple(other.values.shape), tuple(self.values.shape)
            raise ValueError(f"the other sketch has (depth, width, dim) {shapes[0]}; allowed: "
                             f"{shapes[1]}, as this one")  # fmt: skip
        if not torch.equal(other.seeds, self.seeds):
            raise ValueError(f"the other sketch has seeds {other.seeds.tolist()}; allowed: "
                             f"{self.seeds.tolist()}, as this one (the same `seed`)")  # fmt: skip
        if other.values.dtype != self.values.dtype:
            raise ValueError(f"the other sketch is {other.values.dtype}; allowed: "
                             f"{self.values.dtype}, as this one")  # fmt: skip
        self.values.add_(other.values.to(self.values.device))

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.seeds.nbytes

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, as torch's modules do."""
        return {"values": self.values, "seeds": self.seeds}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over values and seeds; the seeds of the checkpoint replace this sketch's."""
        values, seeds = state["values"], state["seeds"]
        if values.shape != self.values.shape or seeds.shape != self.seeds.shape:
            shapes = tuple(values.shape), tuple(self.values.shape)
            raise ValueError(f"the saved sketch has (depth, width, dim) {shapes[0]}; allowed: "
                             f"{shapes[1]}, as this one")  # fmt: skip
        self.values.copy_(values)
        self.seeds.copy_(seeds)


class CountSketch(_RowSketch):
    """For values of both signs: an estimate is the median over tables, and right on average."""

    signed = True


class CountMinSketch(_RowSketch):
    """For values of 0 or more: an estimate is the minimum over tables. It is never too low as long
    as values are only added (decay 0, no cleaning)."""

    signed = False
