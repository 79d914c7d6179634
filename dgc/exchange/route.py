"""Between which ranks a bucket travels, and under which names its collectives meet."""

from __future__ import annotations

from dataclasses import dataclass

from dgc.comm.interface import Comm, Group
from dgc.wire.buckets import Bucket


@dataclass(frozen=True)
class Route:
    """The groups of ranks that a bucket passes, the same for every bucket of an exchange.

    In one level `group` is all ranks. In two, gradients are first summed within the `island`, which
    leaves each of its ranks with one slice of every tensor; `group` is then those ranks of all
    islands that have the same slice.
    everyone: all ranks, over which means are taken. scope: begins the names of the collectives, so
        that those of two optimizers never meet.
    """

    everyone: Comm
    group: Group
    island: Group | None
    scope: str

    @property
    def slice_index(self) -> int:
        """Which slice of every tensor this rank exchanges, from 0."""
        return 0 if self.island is None else self.island.rank

    @property
    def num_slices(self) -> int:
        return 1 if self.island is None else self.island.world_size

    def slice_numel(self, whole: int) -> int:
        """Return the elements of a slice of a tensor of `whole` elements; the last is padded."""
        return -(-whole // self.num_slices)

    def name(self, bucket: Bucket, stage: str = "") -> str:
        """Return the name of a bucket's collective; of one stage, if it has several."""
        return ".".join(part for part in (self.scope, bucket.name, stage) if part)
