import pytest

from dgc.wire.cost import Network, cheapest, dense_cost, gather_cost, sparse_all_reduce_cost

NETWORK = Network(latency_us=50, gbit_per_s=1)


def ring(world_size, blocks):
    """Bytes that one rank sends when each passes each block (bytes, by owner) on but the last."""
    sent = [0] * world_size
    for owner, size in enumerate(blocks):
        for hop in range(world_size - 1):
            sent[(owner + hop) % world_size] += size
    return max(sent)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_bytes_are_those_of_ring_collectives_followed_hop_by_hop(world_size):
    n, k = 960_000, 960
    block = 4 * n / world_size  # an all-reduce is a reduce-scatter and a gather of such blocks
    dense = dense_cost(n, world_size, NETWORK)
    assert dense.num_bytes == pytest.approx(2 * ring(world_size, [block] * world_size))
    assert gather_cost(100, world_size, NETWORK).num_bytes == ring(world_size, [100] * world_size)
    sparse = sparse_all_reduce_cost(n, k, 2.0, lambda count: 3 * count, world_size, NETWORK)
    given = (world_size - 1) * 3 * k / world_size
    returned = ring(world_size, [3 * 2 * k / world_size] * world_size)
    assert sparse.num_bytes == pytest.approx(given + returned)
    assert sparse.num_messages == dense.num_messages == 2 * (world_size - 1)


def test_time_is_latency_of_messages_and_bytes_over_bandwidth():
    assert gather_cost(125_000, 2, NETWORK).seconds == pytest.approx(50e-6 + 1e-3)
    assert dense_cost(1000, 1, NETWORK).seconds == 0


@pytest.mark.parametrize(
    ("world_size", "density", "entry_bytes", "expected"),
    [(4, 0.001, 2.5, "gather"), (1024, 0.001, 2.5, "sparse_all_reduce"), (4, 1.0, 8, "dense"),
     (64, 0.3, 8, "dense")],
)  # fmt: skip
def test_the_cheapest_is_found(world_size, density, entry_bytes, expected):
    n = 25_000_000
    k = int(n * density)

    def message_bytes(count):
        return 24 + int(entry_bytes * count)

    costs = {
        "dense": dense_cost(n, world_size, NETWORK),
        "gather": gather_cost(message_bytes(k), world_size, NETWORK),
        "sparse_all_reduce": sparse_all_reduce_cost(n, k, 4.0, message_bytes, world_size, NETWORK),
    }
    assert cheapest(costs) == expected


def test_what_a_rank_sends_in_a_sparse_all_reduce_hardly_grows_with_the_ranks():
    sizes = [
        sparse_all_reduce_cost(
            25_000_000, 25_000, 4.0, lambda k: 24 + int(2.5 * k), p, NETWORK
        ).num_bytes
        for p in (4, 16, 64, 256, 1024)
    ]
    assert max(sizes) < 2 * min(sizes)
