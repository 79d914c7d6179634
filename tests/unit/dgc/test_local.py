import pytest
import torch

from dgc.local import run_local


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
