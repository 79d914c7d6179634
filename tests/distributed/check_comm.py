"""Run by test_comm.py on real ranks: collectives in pieces, several comms, lives of Horovod's.

argv: what is begun, and who begins it: `comm` or `person`.
"""

import concurrent.futures
import contextlib
import os
import random
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm import HorovodComm, TorchComm, objects, pieces
from dgc.comm.torch_distributed import group as torch_group
from dgc.comm.torch_distributed import mail
from dgc.comm.torch_distributed.ordered_group import OrderedGroup
from tests.emulation.pretended import Pretended, Watch

DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.bool)


@contextlib.contextmanager
def small_pieces():
    """Let a call carry a few elements, and a broadcast a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST_BYTES", 96)
        patch.setattr(pieces, "PIECE_BYTES", 40)
        patch.setattr(objects, "LEAST_BYTES", 16)
        patch.setattr(torch_group, "SMALL_BYTES", 100)
        yield


@contextlib.contextmanager
def unusual_defaults():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def made(rank, size, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def check_collectives(comm, has_shares=True):
    """The sizes of ranks differ, some are far more than a call carries, and some are 1."""
    world, rank = range(comm.world_size), comm.rank
    for size in (1, 24, 25, 100):
        total = sum(made(r, size) for r in world)
        mine = made(rank, size)
        assert comm.all_reduce_async(mine, f"sum{size}").wait() is mine
        torch.testing.assert_close(mine, total)
        if has_shares:
            rows = made(rank, (comm.world_size, size))
            share = comm.reduce_scatter_async(rows, f"share{size}").wait()
            expected = sum(made(r, (comm.world_size, size)) for r in world)[rank]
            torch.testing.assert_close(share, expected)
        for sizes in ([size] * len(world), [1 + size * (r == 1) for r in world]):
            joined = comm.all_gather_async(made(rank, sizes[rank]), f"join{sizes}").wait()
            assert torch.equal(joined, torch.cat([made(r, sizes[r]) for r in world]))
        for largest in (None, 8 * size + 8):
            parts = [made(rank, size * (to == 1) + rank + 1, to) for to in world]
            got = comm.all_to_all_async(parts, f"parts{size}{largest}", largest).wait()
            for sender, part in enumerate(got):
                assert torch.equal(part, made(sender, size * (rank == 1) + sender + 1, rank))


def check_tensors_of_a_gpu(comm):
    """Of ranks that share it: they go through the host's memory, and results are where they were.

    The GPU is pretended.
    """
    world, rank = range(comm.world_size), comm.rank
    with Watch():
        mine, cast = Pretended(made(rank, 100)), Pretended(made(rank, 90))
        assert comm.all_reduce_async(mine, "there.sum").wait() is mine
        joined = comm.all_gather_async(Pretended(made(rank, rank + 1)), "there.join").wait()
        rows = Pretended(made(rank, (comm.world_size, 30)))
        share = comm.reduce_scatter_async(rows, "there.share").wait()
        parts = [Pretended(made(rank, rank + 1, to)) for to in world]
        got = comm.all_to_all_async(parts, "there.parts").wait()
        comm.broadcast(cast, "there.cast")
    assert all(type(tensor) is Pretended for tensor in (mine, joined, share, *got, cast))
    torch.testing.assert_close(mine.held, sum(made(r, 100) for r in world))
    assert torch.equal(joined.held, torch.cat([made(r, r + 1) for r in world]))
    torch.testing.assert_close(share.held, sum(made(r, (len(world), 30)) for r in world)[rank])
    for sender, part in enumerate(got):
        assert torch.equal(part.held, made(sender, sender + 1, rank))
    assert torch.equal(cast.held, made(0, 90))


def check_order(comm):
    """Ranks await their collectives in different orders; each of them has several calls."""
    names = [f"order{n}" for n in range(4)]
    handles = {n: comm.all_gather_async(made(comm.rank, 90), n) for n in names}
    for name in names[:: 1 if comm.rank else -1]:
        assert len(handles[name].wait()) == 90 * comm.world_size
    assert not pieces._under_way


def check_broadcast(comm):
    for dtype in DTYPES:
        for shape in ((), (0,), (7,), (3, 5), (1, 9), (30, 1)):
            given = made(0, shape).mul(3).to(dtype)
            mine = given.clone() if comm.rank == 0 else torch.zeros_like(given)
            comm.broadcast(mine, "plain")
            assert torch.equal(mine, given), f"{dtype} {shape}"
    given = made(0, (4, 6, 5)).to(torch.complex64)
    for view in (lambda t: t, lambda t: t.permute(2, 0, 1), lambda t: t[::2, 1:], torch.conj):
        mine = given.clone() if comm.rank == 0 else torch.zeros_like(given)
        version = mine._version
        comm.broadcast(view(mine), "view")
        assert torch.equal(view(mine), view(given))
        assert comm.rank == 0 or mine._version > version, "autograd must see the change"
    strides = torch.zeros(5, 4, 6) if comm.rank else made(0, (4, 6, 5)).permute(2, 0, 1)
    comm.broadcast(strides, "ranks' strides differ")
    assert torch.equal(strides, made(0, (4, 6, 5)).permute(2, 0, 1))


def value_of(rank):
    shared = made(rank, 50)
    return {
        "rank": rank, "twice": [shared, shared], "none": None, "empty": torch.zeros(0),
        "weight": nn.Parameter(made(rank, (3, 40))), "step": torch.tensor(3.0),
        "strided": made(rank, (4, 6, 5)).permute(2, 0, 1), "gaps": made(rank, 90)[::2],
        "one in many": made(rank, 1).expand(60), "bytes": b"x" * 300,
        "bfloat16": made(rank, 60).bfloat16(), "flags": made(rank, 99) > 0,
        "leaf": made(rank, 44).requires_grad_(), "rows": made(rank, (9, 9)).to_sparse(),
    }  # fmt: skip


def check_objects(comm):
    mine = value_of(comm.rank)
    for rank, found in enumerate([comm.broadcast_object(mine), *comm.all_gather_object(mine)]):
        expected = value_of(max(0, rank - 1))
        assert list(found) == list(expected)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                same = torch.equal(found[name].to_dense(), value.to_dense())
                assert same and type(found[name]) is type(value), name
                assert found[name].requires_grad == value.requires_grad, name
            elif name != "twice":
                assert found[name] == value, name
        assert found["twice"][0] is found["twice"][1]
        assert found["strided"].stride() == expected["strided"].stride()
    assert comm.all_gather_object(mine)[comm.rank]["twice"][0] is not mine["twice"][0]


def check_two_optimizers(comms):
    """Two models, each with a comm of its own, in one backward; ranks step them in one order."""
    torch.manual_seed(0)
    models = [nn.Linear(40, 40), nn.Linear(40, 40)]
    optimizers = [
        DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), comm=comm,
            compression=Compression(density=0.1, min_numel=100),
        )
        for model, comm in zip(models, comms, strict=True)
    ]  # fmt: skip
    for step in range(3):
        loss = models[1](models[0](made(comms[0].rank, (8, 40), step))).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    vector = nn.utils.parameters_to_vector([p for m in models for p in m.parameters()])
    for other in comms[1].all_gather_object(vector.detach()):
        assert torch.equal(other, vector)
    return [bucket for o in optimizers for bucket in {o._exchange.route.name(b) for b in o.buckets}]


def check_join(hvd, join):
    for call in (hvd.join, hvd.mpi_ops.join, join):
        with pytest.raises(RuntimeError, match="hvd.join.*drop_last"):
            call()


def pairs(comm):
    return comm.split([[0], list(range(1, comm.world_size))])


def check_two_comms(first, second):
    with unusual_defaults():
        assert first.nodes() == [0] * first.world_size
        first.barrier()
    names = check_two_optimizers([first, second])
    assert len(set(names)) == len(names), names


def begun_by_us():
    import horovod.torch as hvd
    from horovod.torch import join  # before there is a HorovodComm

    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"  # which it asks for only on several nodes
    first = HorovodComm()
    first.all_reduce_async(torch.ones(3), "under way")
    second = HorovodComm()
    with small_pieces(), unusual_defaults():
        for check in (check_collectives, check_order):
            check(first)
    with small_pieces():
        check_tensors_of_a_gpu(first)
        check_broadcast(first)
        check_objects(second)
    check_two_comms(first, second)
    check_join(hvd, join)
    assert first.can_split and second.can_split
    assert pairs(first)._set.process_set_id == pairs(second)._set.process_set_id != 0
    second.close()
    second.close()
    check_join(hvd, join)
    first.barrier("Horovod is still there")
    first.close()
    assert not hvd.is_initialized()
    with pytest.raises(Exception, match="not been initialized"):
        join()
    if "HOROVOD_GLOO_RENDEZVOUS_PORT" in os.environ:
        check_further_lives()


def check_further_lives():
    """Without a store of its own, every fiftieth life of two ranks stands still or fails."""
    stores = {os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]}
    os.environ["http_proxy"] = "http://127.0.0.1:9"  # nobody listens there
    for life in range(5):
        comm = HorovodComm()
        stores |= {os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]}
        assert len(stores) == life + 2, "ranks met where they had met before"
        total = pairs(comm).all_reduce_async(torch.ones(1), "a group of this life").wait()
        assert total == (1 if comm.rank == 0 else comm.world_size - 1), life
        comm.close()


def begun_by_a_person():
    """Horovod is the person's: it stays as it is, and may end and begin anew.

    Under Gloo a person's second life may fail (dgc/comm/horovod/rendezvous.py); MPI needs mpi4py.
    """
    import horovod.torch as hvd
    from mpi4py import MPI

    hvd.init()
    comms = [HorovodComm(), HorovodComm()]
    assert not any(comm.can_split for comm in comms), "one node needs no groups"
    with pytest.raises(RuntimeError, match="HOROVOD_DYNAMIC_PROCESS_SETS=1"):
        pairs(comms[0])
    names = check_two_optimizers(comms)
    for comm in comms:
        comm.close()
    assert hvd.is_initialized(), "a HorovodComm has ended what a person began"
    hvd.allreduce(torch.ones(1), name="theirs")
    assert int(os.environ["HOROVOD_FUSION_THRESHOLD"]) == 128 * 2**20, "0 would mislead: too late"

    for life in range(2):
        MPI.COMM_WORLD.Barrier()
        hvd.shutdown()
        hvd.init()
        comm = HorovodComm()
        assert comm.can_split
        total = pairs(comm).all_reduce_async(torch.ones(1), "a group of this life").wait()
        assert total == (1 if comm.rank == 0 else comm.world_size - 1), life
    assert not set(names) & set(check_two_optimizers([comm, comm]))


def torch_begun_by_us():
    """From torchrun's variables, and ended with the last TorchComm."""
    mail.FRAME_BYTES = 300  # of which most are names
    first = TorchComm()
    first.all_reduce_async(torch.ones(3), "under way")
    second = TorchComm()
    with small_pieces():
        with unusual_defaults():
            for check in (check_collectives, check_order):
                check(first)
        check_tensors_of_a_gpu(first)
        check_broadcast(first)
        check_objects(second)
    check_two_comms(first, second)
    check_starts_in_any_order(first, pairs(first))
    with pytest.raises(ValueError, match="rank . gave .* elements .* to the sum 'uneven'"):
        first.all_reduce_async(torch.ones(3 + first.rank), "uneven").wait()
    # What NCCL's collectives are ordered by, with gloo's in their place: there is no GPU.
    ordered = OrderedGroup(first._life.turns, first._mail, dist.new_group(), range(3))
    check_collectives(ordered, has_shares=False)  # gloo's reduce-scatter cannot be polled
    check_order(ordered)
    group, others = dist.new_group([1, 2]), []
    if first.rank:
        others = [OrderedGroup(first._life.turns, first._mail, group, [1, 2])]
    check_starts_in_any_order(ordered, *others)
    kept = {*first._mail._posts, *first._mail._unfinished}
    assert all("under way" in key or ":close:" in key for key in kept), "something is kept for ever"
    second.close()
    second.close()
    first.barrier("torch is still there")
    first.close()
    assert not dist.is_initialized() and threading.active_count() == 1


def check_starts_in_any_order(*groups):
    """What torch.distributed cannot: each rank starts in an order of its own, on any thread."""
    wanted = [(group, f"any{n}") for n in range(5) for group in groups]
    order = random.Random(groups[0].rank).sample(wanted, len(wanted))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        started = {
            key: pool.submit(key[0].all_reduce_async, made(0, 30_000), key[1]) for key in order
        }
    for group, name in random.Random(9 - groups[0].rank).sample(wanted, len(wanted)):
        assert torch.equal(started[group, name].result().wait(), made(0, 30_000) * group.world_size)


def torch_begun_by_a_person():
    """The person's groups stay as they are, and may end and begin anew; nothing need be closed."""
    dist.init_process_group("gloo")
    comm = TorchComm()
    check_two_optimizers([comm, TorchComm()])
    comm.close()
    comm = TorchComm()
    theirs = torch.ones(1)
    dist.all_reduce(theirs)
    assert theirs == comm.world_size
    dist.destroy_process_group()
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore("again", store)  # torch itself may find the old group's addresses
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    again = TorchComm()
    check_two_optimizers([again, again])
    comm.close()  # of the life before
    again.all_reduce_async(made(0, 2**20), "never awaited")
    if comm.rank == 0:
        dist.destroy_process_group()


if __name__ == "__main__":
    {
        ("horovod", "comm"): begun_by_us,
        ("horovod", "person"): begun_by_a_person,
        ("torch", "comm"): torch_begun_by_us,
        ("torch", "person"): torch_begun_by_a_person,
    }[sys.argv[1], sys.argv[2]]()
    print("rank passed every check", flush=True)
