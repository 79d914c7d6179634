"""Whatever the way, replicas agree to the bit and nothing is lost."""

import copy

import pytest
import torch

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.comm.topology import choose_islands
from dgc.exchange.exchange import Exchange
from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.statistics import Statistics
from optim import FactoredAdam
from tests.unit.dgc.method import assert_equal

CPU = torch.device("cpu")
SHAPES = {"bias": 67, "w1": 5001, "w2": 40_000}
WAYS = [
    (protocol, ranks_per_node)
    for protocol in ("gather", "sparse_all_reduce", "dense")
    for ranks_per_node in (1, 2)
]


def make(comm, momentum=0.0, bucket_bytes=10**9, rows=None, **settings):
    compression = Compression(**{"density": 0.01} | settings)
    islands = choose_islands(comm, compression)
    exchange = Exchange(
        comm, compression, Compensation(momentum, residual_dtype=compression.residual_dtype),
        Statistics(), islands,
    )  # fmt: skip
    specs = [
        TensorSpec(name, exchange.route.slice_numel(numel), CPU, name != "bias", numel)
        for name, numel in SHAPES.items()
    ]
    if rows:
        specs.append(TensorSpec("embedding", 30 * 4, CPU, False, 30 * 4, row_size=4))
    exchange.lay_out(specs, compression.density, bucket_bytes)
    return exchange


def gradients(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(numel, generator=generator) ** 3 for name, numel in SHAPES.items()}


def go(exchange, grads):
    """Exchange; return each tensor's mean in full, or None."""
    for name, grad in grads.items():
        exchange.add(name, grad.clone())
        exchange.complete(name)
    update = exchange.finish()
    if update is None:
        return None
    means = dict(update.dense)
    for name, mean in update.sparse.items():
        assert mean.positions_K.diff().gt(0).all()
        means[name] = torch.zeros(SHAPES[name]).index_put((mean.positions_K,), mean.values_M)
    return means


def left_on(exchange):
    """What this rank's residuals hold, by tensor, each at its place in the whole."""
    found = {}
    for name, numel in SHAPES.items():
        whole = torch.zeros(exchange.route.num_slices, exchange.route.slice_numel(numel))
        residual = exchange.kept.compensation.residual.get(name)
        if residual is not None:
            whole[exchange.route.slice_index] = residual
        assert not whole.view(-1)[numel:].any(), "something in the padding"
        found[name] = whole.view(-1)[:numel].double()
    return found


@pytest.mark.parametrize("value_dtype", ["float32", "float16", "mxfp8", "mxfp4"])
@pytest.mark.parametrize(("protocol", "ranks_per_node"), WAYS)
def test_what_arrives_and_what_is_left_is_what_was_given(protocol, ranks_per_node, value_dtype):
    def work(comm):
        exchange = make(
            comm, protocol=protocol, value_dtype=value_dtype, index_coding="elias_fano",
            merged_factor=1.5,
        )  # fmt: skip
        means = [go(exchange, gradients(comm.rank, step)) for step in range(5)]
        return means, left_on(exchange), exchange.stats.num_selected

    results = run_local(4, work, ranks_per_node)
    for name in SHAPES:
        given = sum(gradients(r, s)[name].double() for r in range(4) for s in range(5))
        left = sum(left[name] for _, left, _ in results)
        for means, _, _ in results:
            arrived = sum(mean[name].double() for mean in means)
            torch.testing.assert_close(4 * arrived + left, given, atol=1e-3, rtol=1e-5)
    assert_equal([means for means, _, _ in results], [results[0][0]] * 4)
    if protocol != "dense":
        assert 0 < results[0][2] < 900


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_a_sparse_all_reduce_that_returns_all_is_a_gather(ranks_per_node):
    def work(comm, **settings):
        exchange = make(comm, momentum=0.9, **settings)
        means = [go(exchange, gradients(comm.rank, step)) for step in range(4)]
        return means, exchange.state_dict()

    whole = {"protocol": "sparse_all_reduce", "merged_factor": 4}
    one = run_local(4, lambda comm: work(comm, **whole), ranks_per_node)
    other = run_local(4, lambda comm: work(comm, protocol="gather"), ranks_per_node)
    assert_equal(one, other)


def test_owners_return_the_largest_sums_whatever_their_signs():
    def work(comm, sign):
        exchange = make(comm, protocol="sparse_all_reduce", merged_factor=1.0)
        grads = gradients(comm.rank, 0)
        means = go(exchange, {name: sign * grad for name, grad in grads.items()})
        return {name: sign * mean for name, mean in means.items()}

    one, other = (run_local(4, lambda comm, s=sign: work(comm, s)) for sign in (1.0, -1.0))
    assert_equal(one, other)


@pytest.mark.parametrize("residual_dtype", ["float32", "bfloat16", "int8"])
def test_what_does_not_arrive_stays_to_the_bit(residual_dtype):
    def work(comm):
        exchange = make(
            comm, momentum=0.9, protocol="sparse_all_reduce", merged_factor=1.0,
            residual_dtype=residual_dtype,
        )  # fmt: skip
        never = make(comm, momentum=0.9, residual_dtype=residual_dtype, density=1e-9)
        grads = gradients(comm.rank, 0)
        means = go(exchange, grads)
        for name, grad in grads.items():
            never.kept.compensation.accumulate(name, grad)
        for name in ("w1", "w2"):
            stays = means[name] == 0
            kinds = ("residual", "velocity")
            mine = [exchange.kept.compensation.state_dict()[kind][name] for kind in kinds]
            whole = [never.kept.compensation.state_dict()[kind][name] for kind in kinds]
            for one, other in zip(mine, whole, strict=True):
                one, other = (t["codes"] if isinstance(t, dict) else t for t in (one, other))
                assert torch.equal(one[stays], other[stays])
                assert not torch.equal(one, other)
        return exchange.stats.num_selected

    run_local(3, work)


def test_two_levels_select_from_the_sums_of_the_nodes():
    """One step by hand: node sums, each local rank the largest of its share, then the mean."""

    def work(comm):
        return go(make(comm, protocol="gather"), gradients(comm.rank, 0))

    expected = {}
    for name, numel in SHAPES.items():
        share = -(-numel // 2)
        total = torch.zeros(2 * share)
        for node in (0, 1):
            summed = torch.zeros(2 * share)
            for rank in (2 * node, 2 * node + 1):
                summed[:numel] += gradients(rank, 0)[name]
            for start in (0, share) if name != "bias" else ():
                part = summed[start : start + share]
                kth = part.abs().sort(descending=True).values[-(-share // 100) - 1]
                part[part.abs() < kth] = 0
            total += summed
        expected[name] = total[:numel] / 4
    for means in run_local(4, work, 2):
        torch.testing.assert_close(means["bias"], expected["bias"])
        for name in ("w1", "w2"):
            hits = (means[name] != 0) == (expected[name] != 0)
            assert (~hits).sum() <= 0.35 * (expected[name] != 0).sum()  # counts vary by k_tolerance
            both = (means[name] != 0) & (expected[name] != 0)
            close = torch.isclose(means[name][both], expected[name][both])
            assert close.float().mean() > 0.9  # where one node's entry is below its threshold


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["bias", "w1", "w2"])
@pytest.mark.parametrize(("protocol", "ranks_per_node"), WAYS)
def test_a_bad_gradient_undoes_the_step_on_every_rank(protocol, ranks_per_node, where, bad):
    def work(comm, disturbed):
        exchange = make(comm, momentum=0.9, protocol=protocol, bucket_bytes=1, value_dtype="mxfp8")
        go(exchange, gradients(comm.rank, 0))
        if disturbed:
            before = copy.deepcopy(exchange.state_dict())
            grads = gradients(comm.rank, 1)
            if comm.rank == 2:
                grads[where][5] = bad
            assert go(exchange, grads) is None
            assert where in exchange.stats.skipped
            assert_equal(exchange.state_dict(), before)
        return go(exchange, gradients(comm.rank, 2)), exchange.state_dict()

    results = [run_local(4, lambda comm, d=d: work(comm, d), ranks_per_node) for d in (True, False)]
    assert_equal(*results)


def row_sparse(rows, values):
    return torch.sparse_coo_tensor(rows[None], values, (30, 4), check_invariants=True)


def test_rows_travel_as_rows_and_are_summed_in_rank_order():
    def work(comm):
        exchange = make(comm, rows=True)
        generator = torch.Generator().manual_seed(comm.rank)
        rows = torch.randint(30, (0 if comm.rank == 1 else 12,), generator=generator)
        values = torch.randn(rows.numel(), 4, generator=generator)
        for half in (slice(0, 6), slice(6, None)):  # two micro-batches
            exchange.add_rows("embedding", row_sparse(rows[half], values[half]))
        exchange.complete("embedding")
        for name, grad in gradients(comm.rank, 0).items():
            exchange.add(name, grad)
            exchange.complete(name)
        update = exchange.finish()
        dense = torch.zeros(30, 4).index_add(0, rows, values)
        return update.rows["embedding"], dense, rows, exchange.stats.row_bytes

    results = run_local(3, work)
    mean = sum(dense for _, dense, _, _ in results) / 3
    touched = torch.cat([rows for _, _, rows, _ in results]).unique()
    for (rows, values), _, mine, num_bytes in results:
        assert torch.equal(rows, touched)
        torch.testing.assert_close(values, mean[touched])
        assert torch.equal(values, results[0][0][1])
        assert num_bytes <= 40 + 20 * mine.unique().numel()  # 4 + 4 x 4 bytes a row


def test_rows_that_are_not_finite_undo_the_step():
    def work(comm):
        exchange = make(comm, rows=True)
        values = torch.full((2, 4), float("nan") if comm.rank == 1 else 1.0)
        exchange.add_rows("embedding", row_sparse(torch.tensor([3, 3]), values))
        for name in ("embedding", *SHAPES):
            exchange.complete(name)
        assert exchange.finish() is None
        return exchange.stats.skipped

    assert run_local(2, work) == ["embedding (rank 1)"] * 2


def test_a_share_of_the_time_in_flight_is_hidden():
    def work(comm):
        exchange = make(comm, bucket_bytes=1)
        go(exchange, gradients(comm.rank, 0))
        stats = exchange.stats
        assert 0 <= stats.hidden_share <= 1
        assert stats.in_flight_seconds >= stats.seconds.get("wait", 0) >= 0
        assert stats.payload_bytes == sum(stats.bytes_by_kind.values())

    run_local(2, work)


def test_the_same_bits_whenever_messages_arrive():
    """Rounding must not depend on which bucket's collective is done first."""

    def work(comm, early):
        exchange = make(
            comm, protocol="sparse_all_reduce", residual_dtype="int8", value_dtype="mxfp8",
            bucket_bytes=1, merged_factor=1.5,
        )  # fmt: skip
        if not early:
            exchange._go_on = lambda: False
        grads = gradients(comm.rank, 0)
        for name, grad in grads.items():
            exchange.add(name, grad.clone())
            exchange.complete(name)
            comm.barrier()
        if not early:
            del exchange._go_on
        exchange.finish()
        return exchange.state_dict()

    assert_equal(*(run_local(3, lambda comm, e=early: work(comm, e)) for early in (True, False)))


class Half:
    """A statistic that has seen nothing in one half of a tensor."""

    def __init__(self, numel, first):
        self.tensors, self.shared_names, self.may_be_zero = {}, (), True
        self.root_N = torch.full((numel,), 2.0)
        self.root_N[: numel // 2 if first else 0] = 0

    @staticmethod
    def observe_together(given):
        pass

    def root(self, indices=None):
        return self.root_N if indices is None else self.root_N[indices]

    @staticmethod
    def roots_together(asked, positions_K):
        parts = positions_K.split([count for _, count, _ in asked])
        pairs = zip(asked, parts, strict=True)
        return torch.cat([mine.root(part - first) for (mine, _, first), part in pairs])


@pytest.mark.parametrize("value_dtype", ["mxfp8", "mxfp4"])
def test_a_sum_whose_owner_has_no_statistic_there_is_not_rounded(value_dtype):
    def work(comm):
        exchange = make(
            comm, protocol="sparse_all_reduce", value_dtype=value_dtype, preconditioning="late",
            index_coding="elias_fano",
        )  # fmt: skip
        for name in ("w1", "w2"):
            half = Half(SHAPES[name], first=comm.rank == 0)
            exchange.kept.statistics.preconditioners[name] = half
        grads = gradients(comm.rank, 0)
        return go(exchange, grads), grads, left_on(exchange)

    results = run_local(3, work)
    for name in ("w1", "w2"):
        given = sum(grads[name].double() for _, grads, _ in results)
        left = sum(left[name] for _, _, left in results)
        arrived = 3 * results[0][0][name].double() * 2.0  # divided by 2 where it was sent
        torch.testing.assert_close(arrived + left, given, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("select_by", ["raw", "preconditioned"])
def test_in_two_levels_a_share_is_divided_by_its_own_part_of_the_statistic(density, select_by):
    """Upper gradients are 1000 times the lower: steps of Adam are alike, wherever the share is."""

    def work(comm):
        weight = torch.nn.Parameter(torch.zeros(401, 50))
        optimizer = DistributedOptimizer(
            FactoredAdam([weight], lr=1.0, betas=(0.0, 0.999), min_compressed_numel=0),
            [("w", weight)], comm=comm,
            compression=Compression(density=density, select_by=select_by, two_level=True),
        )  # fmt: skip
        grad = torch.randn(401, 50, generator=torch.Generator().manual_seed(comm.rank))
        grad[:200] *= 1000
        for _ in range(8):
            weight.backward(grad)
            optimizer.step()
        return weight.detach()

    weights = run_local(4, work, ranks_per_node=2)
    assert_equal(weights, [weights[0]] * 4)
    upper, lower = (part[part != 0].abs() for part in (weights[0][:200], weights[0][201:]))
    assert 0.3 < upper.mean() / lower.mean() < 3


def test_a_state_of_another_share_is_refused_and_nothing_changes():
    def work(comm, place):
        exchange = make(comm)
        go(exchange, gradients(comm.rank, 0))
        before = copy.deepcopy(exchange.state_dict())
        with pytest.raises(ValueError, match=rf"allowed: \({place}, 2\), as ranks are placed"):
            exchange.load_state_dict({**before, "share": torch.tensor([1 - place, 2])})
        bad = {**before, "thresholds": {"w1": torch.zeros(3)}}
        with pytest.raises(ValueError, match="the saved threshold of w1"):
            exchange.load_state_dict({**bad, "compensation": {}})
        assert_equal(exchange.state_dict(), before)
        exchange.load_state_dict(before)
        assert_equal(exchange.state_dict(), before)

    run_local(4, lambda comm: work(comm, comm.rank % 2), 2)


def test_in_two_levels_a_share_is_divided_by_what_the_whole_island_has_seen():
    """Rank 1 alone has gradients: where its neighbour owns them, that one must know their size."""

    def work(comm):
        weight = torch.nn.Parameter(torch.zeros(400, 50))
        optimizer = DistributedOptimizer(
            FactoredAdam([weight], lr=1.0, betas=(0.0, 0.999), min_compressed_numel=0),
            [("w", weight)], comm=comm, compression=Compression(density=0.01, two_level=True),
        )  # fmt: skip
        grad = torch.randn(400, 50, generator=torch.Generator().manual_seed(comm.rank))
        for _ in range(3):
            weight.backward(grad if comm.rank % 2 else grad * 1e-6)
            optimizer.step()
        return weight.detach()

    for weight in run_local(4, work, ranks_per_node=2):
        assert 0.1 < weight[weight != 0].abs().max() < 10  # 1e5 by the neighbour's own statistic
