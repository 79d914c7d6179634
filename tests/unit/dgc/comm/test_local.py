import pytest
import torch

from dgc.comm.local import run_local


def test_sums_and_gathers_go_in_rank_order():
    def work(comm):
        values = torch.full((3,), float(comm.rank + 1))
        total = comm.all_reduce_async(values, "sum").wait()
        joined = comm.all_gather_async(torch.full((comm.rank + 1,), comm.rank), "join").wait()
        return total.tolist(), joined.tolist(), comm.all_gather_object({"rank": comm.rank})

    for total, joined, objects in run_local(3, work):
        assert total == [6.0] * 3
        assert joined == [0, 1, 1, 2, 2, 2]
        assert objects == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def test_everyone_gets_rank_0s_value():
    def work(comm):
        tensor = torch.full((2,), float(comm.rank))
        comm.broadcast(tensor, "b")
        return tensor.tolist(), comm.broadcast_object(f"from {comm.rank}")

    assert run_local(2, work) == [([0.0, 0.0], "from 0")] * 2


def test_a_failing_worker_releases_the_others():
    def work(comm):
        if comm.rank == 1:
            raise KeyError("mine")
        comm.barrier()

    with pytest.raises(KeyError, match="mine"):
        run_local(3, work)


def test_what_horovod_cannot_send_is_refused():
    def work(comm):
        with pytest.raises(TypeError, match="bfloat16"):
            comm.all_reduce_async(torch.zeros(2, dtype=torch.bfloat16), "x")
        with pytest.raises(ValueError, match="empty"):
            comm.all_gather_async(torch.zeros(0), "x")

    run_local(1, work)


def test_shares_of_sums_and_parts_for_each():
    def work(comm):
        rows = torch.arange(6.0).view(3, 2) * (comm.rank + 1)
        share = comm.reduce_scatter_async(rows, "share").wait()
        parts = [torch.full((to + 1,), 10 * comm.rank + to) for to in range(3)]
        got = comm.all_to_all_async(parts, "parts").wait()
        return share.tolist(), [part.tolist() for part in got]

    for rank, (share, got) in enumerate(run_local(3, work)):
        assert share == [6 * 2.0 * rank, 6 * (2.0 * rank + 1)]
        assert got == [[10 * sender + rank] * (rank + 1) for sender in range(3)]


def test_groups_talk_among_themselves_in_any_order():
    def work(comm):
        group = comm.split([[0, 2], [1, 3]])
        handles = {
            name: group.all_gather_async(torch.tensor([comm.rank]), name)
            for name in ("ab" if comm.rank < 2 else "ba")
        }
        return [handles[name].wait().tolist() for name in "ab"], comm.nodes()

    for rank, (joined, nodes) in enumerate(run_local(4, work, ranks_per_node=2)):
        assert joined == [[rank % 2, rank % 2 + 2]] * 2
        assert nodes == [0, 0, 1, 1]
