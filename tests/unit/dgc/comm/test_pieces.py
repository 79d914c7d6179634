import time

import pytest
import torch

from dgc.comm import pieces
from dgc.comm.local import run_local
from dgc.comm.pieces import Stepwise, as_bytes, parts_of, wait_until

SIZES = (1, 5, 6, 7, 24, 25, 100)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "MOST_BYTES", 72)  # of float32: 18 elements, 6 from each of three
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40)


class Watched:
    """One call's size in bytes, over all ranks, is noted."""

    def __init__(self, comm):
        self.comm, self.sizes, self.names = comm, [], []

    def note(self, name, size):
        self.names.append(name)
        if not name.endswith(".sizes"):
            self.sizes.append(size)

    def gather(self, tensor, name):
        assert tensor.numel() > 0
        joined = self.comm.all_gather_async(tensor, name).wait()
        self.note(name, joined.nbytes)
        return Done(joined)

    def scatter(self, rows, name):
        self.note(name, rows.nbytes)
        return self.comm.reduce_scatter_async(rows, name)

    def reduce(self, part, name):
        self.note(name, part.nbytes)
        return self.comm.all_reduce_async(part, name)

    def all_to_all(self, parts, name):
        got = self.comm.all_to_all_async(parts, name).wait()
        self.note(name, max(sum(p.nbytes for p in parts), sum(p.nbytes for p in got)))
        return Done(got)


class Done:
    name = "done"

    def __init__(self, result):
        self.result = result

    def poll(self):
        return True

    def wait(self):
        return self.result


def run(calls):
    handle = next(calls)
    while True:
        try:
            handle = calls.send(handle.wait())
        except StopIteration as end:
            return end.value


def made(rank, size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(100 * seed + rank))


def check_limits(comm, work):
    """Return what work(watched) does; no call is too large, and all ranks make the same ones."""
    watched = Watched(comm)
    result = work(watched)
    assert all(size <= pieces.MOST_BYTES for size in watched.sizes)
    assert len(set(map(tuple, comm.all_gather_object(watched.names)))) == 1
    assert len(set(watched.names)) == len(watched.names)
    return result, watched.names


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_those_of_one_call(size):
    def work(comm):
        mine, whole = made(comm.rank, size), made(comm.rank, size)
        sums, _ = check_limits(comm, lambda w: run(pieces.all_reduce(w.reduce, mine, "sum")))
        assert sums is mine
        assert torch.equal(mine, comm.all_reduce_async(whole, "whole").wait())
        rows = made(comm.rank, (3, size))
        share, _ = check_limits(comm, lambda w: run(pieces.reduce_scatter(w.scatter, rows, "s")))
        assert torch.equal(share, comm.reduce_scatter_async(rows, "shares").wait())

    run_local(3, work)


@pytest.mark.parametrize("sizes", [(s, s, s) for s in SIZES] + [(1, 100, 6), (40, 1, 1), (5, 6, 7)])
def test_a_gather_joins_messages_of_any_sizes(sizes):
    def work(comm):
        mine = made(comm.rank, sizes[comm.rank])
        joined, names = check_limits(comm, lambda w: run(pieces.all_gather(w.gather, mine, "g", 3)))
        assert torch.equal(joined, torch.cat([made(r, s) for r, s in enumerate(sizes)]))
        return names

    names = run_local(3, work)[0]
    if sum(sizes) < 6:  # nobody gave all that it might: nothing more to ask
        assert names == ["g"]
    assert names[:2] == ["g", "g.sizes"] or len(names) == 1


@pytest.mark.parametrize("size", SIZES)
def test_parts_for_each_arrive_whatever_their_sizes(size):
    def part(sender, to):
        return made(sender, 1 + size * (sender != to) + 30 * (to == 1), to)

    def work(comm):
        parts = [part(comm.rank, to) for to in range(3)]
        got, _ = check_limits(
            comm,
            lambda w: run(pieces.all_to_all(w.all_to_all, w.gather, parts, "p", comm.rank)),
        )
        for sender, found in enumerate(got):
            assert torch.equal(found, part(sender, comm.rank))

    run_local(3, work)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (10,), (11,), (1, 1, 99), (2, 30), (50, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.complex64])
def test_parts_of_a_tensor_are_views_by_its_shape_alone(shape, dtype):
    tensor = torch.zeros(shape, dtype=dtype)
    other = torch.zeros(shape[::-1], dtype=dtype).permute(tuple(range(len(shape)))[::-1])
    parts, others = list(parts_of(tensor)), list(parts_of(other))
    assert [p.shape for p in parts] == [p.shape for p in others]
    assert all(p.nbytes <= max(40, p.element_size()) for p in parts)
    for number, part in enumerate(parts):
        part.add_(number + 1)
    assert (tensor != 0).all() and tensor.numel() == sum(p.numel() for p in parts)
    assert torch.equal(tensor.sum(), sum((p.sum() for p in parts), tensor.new_zeros(())))


@pytest.mark.parametrize(
    ("view", "is_own"),
    [
        (lambda t: t, True), (lambda t: t[1:3], True), (lambda t: t[:, :1], False),
        (lambda t: t.t(), False), (lambda t: t[2:, 2:], True), (torch.conj, False),
        (lambda t: t.conj().imag, False), (lambda t: t[0, 0], True),
    ],
)  # fmt: skip
def test_bytes_are_a_tensors_own_where_they_can_be(view, is_own):
    tensor = view(torch.complex(made(0, (3, 3)), made(1, (3, 3))))
    wire, found = as_bytes(tensor)
    assert found == is_own
    assert torch.equal(wire.view(tensor.dtype).view(tensor.shape), tensor)


# ---- handles -------------------------------------------------------------------------------------


class Later(Done):
    """Done when it is told."""

    is_done = False

    def poll(self):
        return self.is_done


def test_each_call_starts_when_the_last_is_done():
    handles, started = [Later(1), Later(2)], []

    def calls():
        for handle in handles:
            started.append((yield handle))
        return "whole"

    stepwise = Stepwise(calls())
    assert not stepwise.poll() and started == []
    handles[0].is_done = True
    assert not stepwise.poll() and started == [1]
    handles[1].is_done = True
    assert stepwise.poll() and stepwise.wait() == "whole" and stepwise.poll()
    assert not pieces._under_way


def test_who_waits_for_one_helps_the_others_on():
    first = Later(1)
    stepwise = Stepwise(calls := iter_of(first, Later(2)))
    first.is_done = True
    start = time.monotonic()
    wait_until(lambda: time.monotonic() - start > 0.1, "another")
    assert next(calls, None) is None, "the second call was not started"
    assert not stepwise.poll()


def test_a_failure_is_told_to_who_waits_for_it_alone(monkeypatch):
    class Failing(Done):
        def wait(self):
            raise RuntimeError("mine")

    stepwise = Stepwise(iter_of(Failing(0)))
    start = time.monotonic()
    wait_until(lambda: time.monotonic() - start > 0.1, "another")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            stepwise.wait()


def iter_of(*handles):
    for handle in handles:
        _ = yield handle


@pytest.mark.parametrize("limit", ["0.05", None])
def test_a_wait_ends_at_the_limit_and_names_the_collective(limit, monkeypatch):
    name = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
    monkeypatch.delenv(name, raising=False)
    if limit is None:
        wait_until(lambda: True, "x")  # a person who began Horovod may not have set it
        return
    monkeypatch.setenv(name, limit)
    with pytest.raises(TimeoutError, match="collective 'x'"):
        wait_until(lambda: False, "x")
    with pytest.raises(TimeoutError, match="collective 'done'"):
        Stepwise(iter_of(Later(0))).wait()
