"""The threshold that a wanted number of entries reach, estimated from a histogram."""

from __future__ import annotations

import math
import struct

import numpy
import torch
from torch import Tensor

from parsimony_kernels.buffers.operands import BIN_SHIFT, BINS

_LAST_FINITE = (0x7F800000 >> BIN_SHIFT) - 1  # of the bins; those above are infinity and NaN
_LARGEST = torch.finfo(torch.float32).max


class Tail:
    """How many of a tensor's magnitudes reach a threshold, estimated from sampled blocks.

    Between the edges of a bin, the logarithm of that number is taken to be linear in the
    threshold's, as in the tail of a power law. What falls into the lowest bin counts as 0.
    Args: histogram: a Report's, (BINS,) int32. sample_every: of the selection that it is of.
    """

    def __init__(self, histogram: Tensor, sample_every: int) -> None:
        # how many entries the n highest bins hold together
        self._from_top = numpy.zeros(BINS + 1, numpy.int64)
        numpy.cumsum(histogram.numpy()[::-1], out=self._from_top[1:])
        self._every = sample_every

    def threshold(self, wanted: float, known: float, count: float) -> float:
        """Return a threshold that about `wanted` entries reach, if `count` reach `known`.

        0 if there are not so many: all that is not 0.
        Example: of a histogram by which twice as many reach 1 as reach 2, wanted=200,
            known=2, count=100 -> 1.
        """
        reached = self._reaching(known)
        if wanted < count and reached > 0:
            return self._reached_by(reached * wanted / count)
        return self._reached_by(reached + (wanted - count) / self._every)

    def count(self, threshold: float, known: float, count: int) -> float:
        """Return about how many reach a threshold, if exactly `count` reach `known`."""
        reached, at_known = self._reaching(threshold), self._reaching(known)
        if threshold > known and at_known > 0:
            return count * reached / at_known
        return max(0.0, count + (reached - at_known) * self._every)

    def _reaching(self, threshold: float) -> float:
        """Return how many of the sample reach a threshold."""
        if threshold == math.inf:
            return 0.0
        index = max(1, _bin_of(threshold))
        inner, outer = self._at_least(index), self._at_least(index + 1)
        low, high = _edge(index), _edge(index + 1)
        part = math.log(max(threshold, low) / low) / math.log(high / low)
        if outer == 0:
            return inner * (1 - part)
        return inner * (outer / inner) ** part

    def _reached_by(self, number: float) -> float:
        """Return the threshold that this many of the sample reach: above all of them for 0."""
        number = max(number, 0.5)
        index = BINS - int(self._from_top.searchsorted(number))
        if index <= 0:
            return 0.0
        index = min(index, _LAST_FINITE)
        inner, outer = max(number, self._at_least(index)), self._at_least(index + 1)
        part = 1 - number / inner if outer == 0 else math.log(inner / number) / max(
            math.log(inner / outer), 1e-9
        )  # fmt: skip
        low, high = _edge(index), _edge(index + 1)
        return low * (high / low) ** min(1.0, part)

    def _at_least(self, index: int) -> int:
        """Return how many of the sample are in this bin or a higher one."""
        return int(self._from_top[BINS - index])


def _edge(index: int) -> float:
    """Return the least magnitude of a bin: by arithmetic, as torch may make denormal floats 0."""
    if index > _LAST_FINITE:
        return _LARGEST
    exponent, eighths = divmod(index, 8)
    if exponent == 0:
        return math.ldexp(eighths / 8, -126)
    return math.ldexp(1 + eighths / 8, exponent - 127)


def _bin_of(magnitude: float) -> int:
    """Return the bin of a finite magnitude."""
    return struct.unpack("I", struct.pack("f", min(magnitude, _LARGEST)))[0] >> BIN_SHIFT
