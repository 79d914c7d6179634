"""Which ranks sum densely among themselves before they exchange sparsely: two levels, or one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dgc.comm.interface import Comm, Group
from dgc.compression import Compression

_log = logging.getLogger(__name__)


def choose_islands(comm: Comm, compression: Compression) -> tuple[Group, Group] | None:
    """Return this rank's (island, bridge), or None for one level. Collective.

    The island is the ranks of this node, or `ranks_per_island` that follow one another; the bridge
    is the ranks of the other islands that have this rank's number in theirs.
    Raises: ValueError where two levels are asked for, and the islands would differ in size or
        Horovod was started without groups.
    """
    wanted, size = compression.two_level, compression.ranks_per_island
    if wanted is False:
        return None
    islands = plan_islands(comm.nodes(), size)
    sizes = sorted({len(island) for island in islands})
    if len(sizes) > 1 and (wanted or size):
        raise ValueError(
            f"two levels need islands of one size; they would have {sizes} ranks. Start as many "
            f"ranks on every node, or set ranks_per_island to what divides {comm.world_size}, or "
            f"two_level=False"
        )
    is_worth_it = len(sizes) == 1 and sizes[0] > 1 and len(islands) > 1
    if not (wanted or is_worth_it):
        return None
    if not all(comm.all_gather_object(comm.can_split)):
        remedy = "set HOROVOD_DYNAMIC_PROCESS_SETS=1 before hvd.init(), on every rank"
        if wanted or size:
            raise ValueError(f"two levels need groups of ranks: {remedy}, or set two_level=False")
        if comm.rank == 0:
            _log.warning("exchanging in one level; for two, %s", remedy)
        return None
    bridges = [list(bridge) for bridge in zip(*islands, strict=True)]
    return comm.split(islands), comm.split(bridges)


def plan_islands(nodes: Sequence[int], size: int | None) -> list[list[int]]:
    """Return the ranks of each island, which is a node, or `size` ranks; nodes: of each rank.

    Example: nodes [0, 1, 0, 1], size None -> [[0, 2], [1, 3]]; size 2 -> [[0, 1], [2, 3]].
    """
    if size is not None:
        nodes = [rank // size for rank in range(len(nodes))]
    return [[r for r, node in enumerate(nodes) if node == own] for own in sorted(set(nodes))]
