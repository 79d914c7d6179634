import copy
import math
import time
import zlib

import pytest
import torch

from dgc import Compression
from dgc.comm.local import run_local
from dgc.exchange.exchange import Exchange
from dgc.wire.buckets import explain, make_buckets
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.statistics import Statistics
from tests.unit.dgc.method import CHOICES, Recording, assert_equal, run_jobs

CPU = torch.device("cpu")


def spec(name, numel, compressible=True):
    return TensorSpec(name, numel, CPU, compressible)


SPECS = [spec("bias", 64, False), spec("w1", 5000), spec("w2", 40_000), spec("w3", 3000)]


def step(comm, exchange, seed=0):
    """Exchange random gradients that differ between ranks; return them and the means."""
    generator = torch.Generator().manual_seed(100 * seed + comm.rank)
    grads = {s.name: torch.randn(s.numel, generator=generator) for s in SPECS}
    give(exchange, grads)
    return grads, means_of(exchange.finish())


def give(exchange, grads):
    for name, grad in grads.items():
        exchange.add(name, grad.clone())
        exchange.complete(name)


def means_of(update):
    """Every tensor's mean in full."""
    means = dict(update.dense)
    numels = {s.name: s.numel for s in SPECS}
    for name, mean in update.sparse.items():
        means[name] = torch.zeros(numels[name]).index_put((mean.positions_K,), mean.values_M)
    return means


def make_exchange(comm, density=0.01, bucket_bytes=1, compensation=None, **settings):
    exchange = Exchange(
        comm, Compression(density=density, **settings), compensation or Compensation(),
        Statistics(),
    )  # fmt: skip
    exchange.lay_out(SPECS, density, bucket_bytes)
    return exchange


def test_buckets_hold_every_tensor_once_and_never_mix_kinds():
    for bucket_bytes in (1, 20_000, 10**9):
        buckets = make_buckets(SPECS, Compression(), 0.01, 2, bucket_bytes)
        names = [s.name for bucket in buckets for s in bucket.specs]
        assert sorted(names) == sorted(s.name for s in SPECS)
        for bucket in buckets:
            assert all(s.compressible for s in bucket.specs) == bucket.is_sparse
    assert len(buckets) == 2


@pytest.mark.parametrize(("mib", "num_buckets"), [(8, 1), (100, 6), (600, 12), (4000, 31)])
def test_buckets_are_a_twelfth_of_the_gradients_within_bounds(mib, num_buckets):
    specs = [
        TensorSpec(f"t{n}", 2**20 // 4, torch.device("cpu"), compressible=True) for n in range(mib)
    ]
    assert len(make_buckets(specs, Compression(), 0.01, 2)) in (num_buckets, num_buckets + 1)


def test_density_one_is_the_dense_path():
    assert not any(b.is_sparse for b in make_buckets(SPECS, Compression(), 1.0, 2, 1))


def test_the_protocol_is_the_settings_or_the_cheapest():
    for protocol in ("gather", "sparse_all_reduce", "dense"):
        buckets = make_buckets(SPECS, Compression(protocol=protocol), 0.01, 64, 10**9)
        assert {b.protocol for b in buckets if b.specs[0].compressible} == {protocol}
        assert {b.protocol for b in buckets if not b.specs[0].compressible} == {"dense"}
    for bucket in make_buckets(SPECS, Compression(link_latency_us=0), 0.01, 64, 10**9):
        assert bucket.protocol == min(bucket.costs, key=lambda name: bucket.costs[name].seconds)
    # on a ring of 4, halves of entries of 8 bytes are 1.5 times what all entries of 4 bytes are
    half = make_buckets(SPECS, Compression(link_latency_us=0), 0.5, 4, 10**9)
    assert {b.protocol for b in half} == {"dense"}


def test_the_plan_is_told_with_all_ways_and_the_one_that_is_taken():
    text = explain(make_buckets(SPECS, Compression(), 0.01, 4, 10**9), 4)
    assert "*gather" in text and " sparse_all_reduce" in text and "*dense" in text
    assert "4 ranks" in text and "48,000" in text


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 10**9])
def test_dense_means_are_the_means(world_size, bucket_bytes):
    results = run_local(
        world_size, lambda c: step(c, make_exchange(c, density=1.0, bucket_bytes=bucket_bytes))
    )
    for s in SPECS:
        mean = torch.stack([grads[s.name] for grads, _ in results]).mean(0)
        for _, means in results:
            torch.testing.assert_close(means[s.name], mean)
            assert torch.equal(means[s.name], results[0][1][s.name])


@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
def test_sum_of_sent_and_left_is_what_was_added_and_ranks_agree(value_dtype):
    def work(comm):
        exchange = make_exchange(comm, value_dtype=value_dtype)
        added = {s.name: torch.zeros(s.numel, dtype=torch.float64) for s in SPECS}
        applied = {s.name: torch.zeros(s.numel, dtype=torch.float64) for s in SPECS}
        for number in range(10):
            grads, means = step(comm, exchange, number)
            for name in added:
                added[name] += grads[name]
                applied[name] += means[name]
        return added, applied, exchange.kept.compensation.residual

    results = run_local(3, work)
    for s in SPECS:
        added = sum(added[s.name] for added, _, _ in results)
        left = sum(residual.get(s.name, torch.zeros(1)).double() for _, _, residual in results)
        for _, applied, _ in results:
            torch.testing.assert_close(applied[s.name] * 3 + left, added, atol=1e-4, rtol=0)
            assert torch.equal(applied[s.name], results[0][1][s.name])


def test_values_beyond_float16_are_sent_in_parts_and_arrive_in_full():
    def work(comm):
        exchange = make_exchange(comm, density=0.001, value_dtype="float16")
        total = torch.zeros(40_000)
        for number in range(4):
            grads = {s.name: torch.zeros(s.numel) for s in SPECS}
            for grad in grads.values():
                grad[7] = 150_000.0 if number == 0 else 0.0
            give(exchange, grads)
            total += means_of(exchange.finish())["w2"]
        return total

    (total,) = run_local(1, work)
    assert total[7] == 150_000.0  # 65504 + 65504 + 18992
    assert total.count_nonzero() == 1


def test_a_rank_with_nothing_to_send_still_takes_part():
    def work(comm):
        exchange = make_exchange(comm)
        give(exchange, {s.name: torch.full((s.numel,), float(comm.rank)) for s in SPECS})
        return means_of(exchange.finish())["w2"].count_nonzero().item(), exchange.stats

    (on_zero, _), (on_one, _) = run_local(2, work)
    assert on_zero == on_one > 0


def test_payload_counts_every_byte_given_to_the_collectives():
    class Counting:
        def __init__(self, comm):
            self._comm, self.sent = comm, 0

        def __getattr__(self, name):
            return getattr(self._comm, name)

        def all_gather_async(self, tensor, name):
            self.sent += tensor.numel() * tensor.element_size()
            return self._comm.all_gather_async(tensor, name)

        def all_reduce_async(self, tensor, name):
            self.sent += tensor.numel() * tensor.element_size()
            return self._comm.all_reduce_async(tensor, name)

    def work(comm):
        counting = Counting(comm)
        exchange = make_exchange(counting)
        step(comm, exchange)
        assert exchange.stats.payload_bytes == counting.sent > 0
        assert exchange.stats.dense_bytes == 4 * (64 + 1)  # and whether the tensor rests
        return exchange.stats.num_selected / exchange.stats.num_selectable

    for density in run_local(2, work):
        assert 0.008 <= density <= 0.013


def test_buckets_leave_in_order_whatever_comes_first():
    def work(comm):
        recording = Recording(comm)
        exchange = make_exchange(recording)
        order = SPECS if comm.rank == 0 else SPECS[::-1]
        for s in order:
            give(exchange, {s.name: torch.ones(s.numel)})
            if comm.rank == 1 and s is not order[-1]:
                assert recording.names == []  # the first bucket is still missing
        assert len(recording.names) == len(exchange.buckets) - 1  # a rank may still give up
        exchange.finish()
        return recording.names

    first, second = run_local(2, work)
    assert first == second
    buckets = make_buckets(SPECS, Compression(), 0.01, 2, 1)
    assert first == [f"exchange0.{bucket.name}" for bucket in buckets]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -(2.0**41)])
@pytest.mark.parametrize("where", ["bias", "w1", "w2"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_that_is_not_finite_undoes_the_step_on_every_rank(bad, where, momentum):
    def work(comm):
        exchange = make_exchange(comm, compensation=Compensation(momentum))
        step(comm, exchange)
        before = copy.deepcopy(exchange.state_dict())
        grads = {s.name: torch.ones(s.numel) for s in SPECS}
        if comm.rank == 1:
            grads[where][5] = bad
        give(exchange, grads)
        assert exchange.finish() is None
        assert where in exchange.stats.skipped
        assert where == "bias" or exchange.stats.skipped == f"{where} (rank 1)"
        assert_equal(exchange.state_dict(), before)
        return step(comm, exchange, seed=1)[1]

    def undisturbed(comm):
        exchange = make_exchange(comm, compensation=Compensation(momentum))
        step(comm, exchange)
        return step(comm, exchange, seed=1)[1]

    assert_equal(run_local(2, work), run_local(2, undisturbed))


def test_a_gradient_given_twice_in_a_step_is_refused():
    def work(comm):
        exchange = make_exchange(comm)
        give(exchange, {"w1": torch.ones(5000)})
        with pytest.raises(RuntimeError, match="w1 has already given its gradient"):
            exchange.complete("w1")
        with pytest.raises(RuntimeError, match="only between steps"):
            exchange.lay_out(SPECS, 0.1, 1)

    run_local(1, work)


class Delayed:
    """A group some of whose collectives have never arrived when asked, but only when awaited."""

    def __init__(self, group, are_late):
        self._group, self._are_late = group, are_late

    def __getattr__(self, name):
        value = getattr(self._group, name)
        if name == "split":
            return lambda groups: Delayed(value(groups), self._are_late)
        return self._timed(value) if name.endswith("_async") else value

    def _timed(self, start):
        def timed(tensor, name, *options):
            handle = start(tensor, name, *options)
            poll, is_late = handle.poll, self._are_late(name)

            def patient():  # as if backward took its time
                end = time.monotonic() + 0.03
                while not is_late and not poll() and time.monotonic() < end:
                    time.sleep(1e-3)
                return not is_late and poll()

            handle.poll = patient
            return handle

        return timed


@pytest.mark.one_in(3)
@pytest.mark.parametrize("two_level", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"preconditioning": "late", "protocol": "gather"},
        {"preconditioning": "late", "protocol": "sparse_all_reduce", "value_dtype": "mxfp4"},
        {"preconditioning": "early", "protocol": "sparse_all_reduce", "residual_dtype": "int8"},
        {"preconditioning": "late", "density": 1.0, "momentum": 0.9},
    ],
)
def test_when_messages_arrive_changes_nothing(settings, two_level):
    """In two levels, statistics were shared in which some islands' means had not yet arrived."""
    choice = {name: values[0] for name, values in CHOICES.items()} | settings
    choice |= {"two_level": two_level, "share_statistics": math.inf}

    def work(job):
        for _ in range(3):
            job.step()
        return job.state()

    none, *others = (
        run_jobs(
            4, "factored", choice, work, bucket_bytes=1,
            wrap=lambda comm, late=late: Delayed(comm, lambda name: late(comm.rank, name)),
        )
        for late in (
            lambda rank, name: True,
            lambda rank, name: False,
            lambda rank, name: rank == 1 and "statistics" in name,
            lambda rank, name: zlib.crc32(f"{rank}.{name}".encode()) % 2,
        )
    )  # fmt: skip
    for other in others:
        assert_equal(other, none)
