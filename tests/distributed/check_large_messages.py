"""Run by test_comm.py on two real ranks: more than 2 GiB by each collective but all_to_all.

That one would take 12 GiB; these take 9 at most, or 12 by torch, on both ranks together.
"""

import torch

from dgc.comm.job import job

LARGE = 2**31 + 2**27  # bytes


def filled(num_bytes, value, dtype=torch.uint8):
    return torch.full((num_bytes // dtype.itemsize,), value, dtype=dtype)


def check_broadcast(comm):
    mine = filled(LARGE, 7 if comm.rank == 0 else 0)
    comm.broadcast(mine, "large")
    assert (mine == 7).all()


def check_object(comm):
    value = {"large": filled(LARGE, 5), "step": 3} if comm.rank == 0 else None
    found = comm.broadcast_object(value)
    assert found["step"] == 3 and len(found["large"]) == LARGE and (found["large"] == 5).all()


def check_sum(comm):
    mine = filled(LARGE, 1 + comm.rank, torch.float32)
    assert (comm.all_reduce_async(mine, "sum").wait() == 3).all()


def check_share(comm):
    rows = filled(LARGE, 1 + comm.rank, torch.float32).view(2, -1)
    share = comm.reduce_scatter_async(rows, "share").wait()
    assert share.nbytes == LARGE // 2 and (share == 3).all()


def check_gather(comm):
    """Rank 0 has far more than rank 1."""
    sizes = [LARGE - 2**28, 2**28]
    joined = comm.all_gather_async(filled(sizes[comm.rank], 1 + comm.rank), "join").wait()
    assert len(joined) == LARGE
    assert all((part == 1 + rank).all() for rank, part in enumerate(joined.split(sizes)))


with job() as comm:
    for check in (check_broadcast, check_object, check_sum, check_share, check_gather):
        check(comm)
        comm.barrier()
        print(f"rank {comm.rank} passed {check.__name__}", flush=True)
