"""The hash of step/sketch.h and of the reference: its definition, and that it spreads rows."""

import math

import pytest
import torch

from parsimony_kernels.runtime.operands import Table
from parsimony_kernels.step import host
from parsimony_kernels.step.reference_sketch import hash_rows


def mix(x):
    """Lowbias32 with Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def table(width, depth=2, seed=0, signed=True, dim=1):
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(0, 2**62, (depth,), generator=generator)
    return Table(torch.zeros(depth, width, dim), seeds, signed)


@pytest.mark.parametrize("width", [1, 2, 273, 2**20 + 1, 2**31 - 1])
def test_buckets_and_signs_are_those_of_the_definition(width):
    rows = torch.tensor([0, 1, 2, 255, 2**16, 2**31 - 1])
    seeds = torch.tensor([0, 1, 2**32 + 5, 2**62 + 12345, -1])
    sketch = Table(torch.empty(5, width, 0), seeds, True)  # 0 columns: any width takes no memory
    buckets, signs = hash_rows(sketch, rows)
    for j, seed in enumerate(seeds.tolist()):
        for i, row in enumerate(rows.tolist()):
            low, high = seed % 2**32, (seed >> 32) % 2**32
            hashed = mix(mix(row ^ low) ^ high)
            assert int(buckets[j, i]) == j * width + (hashed * width >> 32)
            assert float(signs[j, i]) == (-1.0 if hashed % 2 else 1.0)


def test_rows_spread_evenly_and_tables_are_independent():
    """Chi-square within 6 standard deviations; so for rows that follow each other, or are far."""
    for stride, seed in ((1, 0), (1, 7), (4096, 1), (2**15 + 3, 2)):
        rows, width = torch.arange(50_000) * stride % 2**31, 100
        buckets, signs = hash_rows(table(width, seed=seed), rows)
        pairs = buckets[0] * width + (buckets[1] - width)
        for found, cells in ((buckets[0], width), (pairs, width**2), (buckets[0] * 2 + (
            signs[0] > 0), 2 * width)):  # fmt: skip
            counts = found.bincount(minlength=cells).double()
            expected = len(rows) / cells
            statistic = float(((counts - expected) ** 2 / expected).sum())
            assert abs(statistic - cells) < 6 * math.sqrt(2 * cells)
        agreement = float((signs[0] * signs[1]).mean())
        assert abs(agreement) < 6 / math.sqrt(len(rows))


def test_a_count_min_estimate_exceeds_its_bound_as_rarely_as_the_paper_says():
    """Cormode and Muthukrishnan 2005: more than e / width of the total too high in e^-depth."""
    num_rows, width, depth = 2000, 50, 3
    rows = torch.arange(num_rows)
    values = 1 / (1 + rows[:, None].float())  # few large, many small, as words are
    exceeded = 0
    for seed in range(50):
        sketch = table(width, depth, seed, signed=False)
        host.sketch_insert(sketch, rows, values)
        error = host.sketch_query(sketch, rows) - values
        assert float(error.min()) > -1e-5
        exceeded += int((error > math.e / width * values.sum()).sum())
    assert exceeded / (50 * num_rows) < math.exp(-depth)
