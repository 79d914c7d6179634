"""The random numbers of stochastic rounding: a key for every write to a residual or a velocity."""

from __future__ import annotations

import zlib

_64_BITS = 2**64 - 1


class RoundingKeys:
    """Makes keys of 64 bits that differ in every write to a tensor, every step and every rank.

    The key of a write depends on the seed, the step, the tensor's name and how many writes came
    before it in the step; not on when messages about other tensors arrive. So a run repeats to the
    bit. seed: other ranks should have other seeds.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._num_writes: dict[str, int] = {}  # of each tensor in this step

    def key(self, name: str, step: int) -> int:
        """Return the key of the next write to a tensor."""
        self._num_writes[name] = number = self._num_writes.get(name, 0) + 1
        key = self._seed
        for part in (step, number, zlib.crc32(name.encode())):
            key = _mix((key ^ part) & _64_BITS)
        return key

    def drop(self, name: str) -> None:
        """Count a tensor's writes anew: those of this step are undone."""
        self._num_writes.pop(name, None)

    def begin_step(self) -> None:
        self._num_writes.clear()


def _mix(x: int) -> int:
    """Splitmix64's step: a change of one bit changes half of the others."""
    x = (x + 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return x ^ (x >> 31)
