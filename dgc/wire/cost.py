"""Which way a bucket travels: a model of what each protocol sends, and how long that takes.

The volumes are exact for ring collectives and messages of the expected size; the time is
    seconds = messages in a row x latency + bytes sent by one rank / bandwidth
(Hockney 1994). A model and not a measurement, so that all ranks decide alike.
Source: of the sparse all-reduce, Li & Hoefler 2022 (Ok-Topk, arXiv:2201.07598), whose bound of 6k
words, an entry being two, is that of `merged_factor` 2. See exchange/sparse_all_reduce.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

PROTOCOLS = ("dense", "gather", "sparse_all_reduce")
DENSE_BYTES = 4  # of an element in an all-reduce: float32, also for 16-bit parameters


@dataclass(frozen=True)
class Network:
    """The link of one rank: the latency of a message, and what it sends in a second."""

    latency_us: float = 50.0
    gbit_per_s: float = 1.0

    def seconds(self, num_messages: int, num_bytes: float) -> float:
        return num_messages * self.latency_us * 1e-6 + num_bytes * 8e-9 / self.gbit_per_s


@dataclass(frozen=True)
class Cost:
    """What one rank sends, bytes, in so many messages one after the other, and the time."""

    num_bytes: float
    num_messages: int
    seconds: float


def dense_cost(
    numel: int, world_size: int, network: Network, element_bytes: int = DENSE_BYTES
) -> Cost:
    """Return the cost of a ring all-reduce of `numel` float32, or elements of so many bytes."""
    rounds = 2 * (world_size - 1)
    num_bytes = rounds / world_size * element_bytes * numel
    return Cost(num_bytes, rounds, network.seconds(rounds, num_bytes))


def gather_cost(message_bytes: int, world_size: int, network: Network) -> Cost:
    """Return the cost of a ring all-gather of messages of this size: it grows with the ranks."""
    rounds = world_size - 1
    num_bytes = rounds * message_bytes
    return Cost(num_bytes, rounds, network.seconds(rounds, num_bytes))


def sparse_all_reduce_cost(
    numel: int,
    num_entries: int,
    merged_factor: float,
    part_bytes: Callable[[int], int],
    world_size: int,
    network: Network,
) -> Cost:
    """Return the cost of sending each owner its entries, and a ring all-gather of the owners' sums.

    part_bytes: of a message of so many entries of one owner, which has `numel` / world_size
        positions.
    """
    rounds = world_size - 1
    given = part_bytes(math.ceil(num_entries / world_size))
    merged = min(min(merged_factor, world_size) * num_entries, numel) / world_size
    num_bytes = rounds * (given + part_bytes(math.ceil(merged)))
    return Cost(num_bytes, 2 * rounds, network.seconds(2 * rounds, num_bytes))


def cheapest(costs: dict[str, Cost]) -> str:
    """Return the protocol of least time; of equals, the first of PROTOCOLS."""
    return min(PROTOCOLS, key=lambda name: costs[name].seconds)
