"""A parameter of any shape as a matrix (n, m): its first `split` axes form the rows.

The other axes form the columns.
"""

from __future__ import annotations

import functools
import math


@functools.cache
def matrix_shape(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    return math.prod(shape[:split]), math.prod(shape[split:])


@functools.cache
def balanced_split(shape: tuple[int, ...]) -> int:
    """Return the split with the smallest n + m; 0, which makes one row, for vectors and scalars."""
    if len(shape) < 2:
        return 0
    return min(range(1, len(shape)), key=lambda split: sum(matrix_shape(shape, split)))
