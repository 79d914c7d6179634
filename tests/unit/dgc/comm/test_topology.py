import pytest
import torch

from dgc import Compression
from dgc.comm.local import run_local
from dgc.comm.topology import choose_islands, plan_islands


def test_islands_are_nodes_or_neighbours():
    assert plan_islands([0, 0, 1, 1], None) == [[0, 1], [2, 3]]
    assert plan_islands([0, 1, 0, 1], None) == [[0, 2], [1, 3]]
    assert plan_islands([0, 1, 0, 1], 2) == [[0, 1], [2, 3]]
    assert plan_islands([7, 7, 3], None) == [[2], [0, 1]]


@pytest.mark.parametrize(
    ("settings", "ranks_per_node", "expected"),
    [
        ({}, 2, (2, 3)),
        ({}, 1, None),  # nothing to sum within a node
        ({}, 6, None),  # nobody to exchange with
        ({}, 4, None),  # a node of 4, a node of 2
        ({"two_level": False}, 2, None),
        ({"two_level": True}, 1, (1, 6)),
        ({"ranks_per_island": 3}, 6, (3, 2)),
    ],
)
def test_two_levels_where_there_are_two(settings, ranks_per_node, expected):
    def work(comm):
        islands = choose_islands(comm, Compression(**settings))
        if islands is None:
            return None
        island, bridge = islands
        members = [
            group.all_gather_async(torch.tensor([comm.rank]), "who").wait().tolist()
            for group in (island, bridge)
        ]
        assert [ranks[group.rank] for ranks, group in zip(members, islands, strict=True)] == [
            comm.rank
        ] * 2
        return island.world_size, bridge.world_size

    assert run_local(6, work, ranks_per_node) == [expected] * 6


@pytest.mark.parametrize(
    ("settings", "ranks_per_node"), [({"two_level": True}, 4), ({"ranks_per_island": 4}, 6)]
)
def test_islands_of_different_sizes_are_refused_if_asked_for(settings, ranks_per_node):
    with pytest.raises(ValueError, match=r"they would have \[2, 4\] ranks.*two_level=False"):
        run_local(6, lambda comm: choose_islands(comm, Compression(**settings)), ranks_per_node)


def test_a_horovod_that_was_started_without_groups_stays_in_one_level(caplog):
    def work(comm, **settings):
        comm.can_split = comm.rank != 2
        return choose_islands(comm, Compression(**settings))

    assert run_local(4, work, ranks_per_node=2) == [None] * 4
    assert caplog.text.count("set HOROVOD_DYNAMIC_PROCESS_SETS=1 before hvd.init()") == 1
    for asked in ({"two_level": True}, {"ranks_per_island": 2}):
        with pytest.raises(ValueError, match="HOROVOD_DYNAMIC_PROCESS_SETS=1"):
            run_local(4, lambda comm, asked=asked: work(comm, **asked), ranks_per_node=2)
