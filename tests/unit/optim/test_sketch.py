import pytest
import torch

from optim import CountMinSketch, CountSketch
from optim.sketch import hash_seeds, width_for
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.tolerances import assert_close

BOTH = (CountSketch, CountMinSketch)


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.int64)


def loop_insert(sketch, rows, values):
    """Insert one row after another, into one bucket after another."""
    buckets, signs = hash_rows(sketch.table, rows)
    flat = sketch.values.view(-1, sketch.values.shape[2])
    for j in range(len(buckets)):
        for k in range(len(rows)):
            flat[buckets[j, k]] += values[k] * (signs[j, k] if sketch.signed else 1)


def loop_query(sketch, row):
    buckets, signs = hash_rows(sketch.table, rows_of(row))
    flat = sketch.values.view(-1, sketch.values.shape[2])
    found = [flat[b] * s for b, s in zip(buckets[:, 0], signs[:, 0], strict=True)]
    if not sketch.signed:
        return torch.stack([flat[b] for b in buckets[:, 0]]).amin(0)
    ordered = torch.stack(found).sort(0).values
    return ordered[(len(found) - 1) // 2 : len(found) // 2 + 1].mean(0)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [1, 40])
def test_insert_and_query_are_those_of_naive_loops(kind, depth, dim):
    sketch, naive = (kind(None, dim, width=7, depth=depth, seed=3) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2**31, (33,), generator=generator)
    rows[5:9] = rows[0]
    values = torch.randint(0, 9, (33, dim), generator=generator).float()
    sketch.insert(rows, values)
    loop_insert(naive, rows, values)
    assert torch.equal(sketch.values, naive.values)
    for row, estimate in zip(rows.tolist(), sketch.query(rows), strict=True):
        assert torch.equal(estimate, loop_query(naive, row))


def test_the_size_ratio_is_of_the_whole_sketch():
    assert CountSketch(1000, 4).values.shape == (3, 67, 4)
    assert CountMinSketch(1000, 4, depth=5, size_ratio=0.1).values.shape == (5, 20, 4)
    assert CountMinSketch(3, 4).values.shape == (3, 1, 4)
    assert CountMinSketch(0, 4).values.shape == (3, 1, 4)
    assert width_for(200, 3, 0.2) == 13


def test_the_same_seed_makes_the_same_hashes_and_another_seed_others():
    a, b, c = (CountSketch(1000, 4, seed=seed).seeds for seed in (7, 7, 8))
    assert torch.equal(a, b)
    assert not set(a.tolist()) & set(c.tolist())
    assert len(set(a.tolist())) == 3
    assert a.dtype == torch.int64 and a.min() >= 0
    assert not torch.equal(hash_seeds(3, 0, 1), hash_seeds(3, 1, 0))


def test_making_a_sketch_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    CountSketch(1000, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", BOTH)
def test_an_average_without_collisions_is_an_average(kind):
    sketch, rows = kind(None, 5, width=10_000), torch.arange(20)
    assert all(len(b.unique()) == 20 for b in hash_rows(sketch.table, rows)[0])
    average = torch.zeros(20, 5)
    for values in torch.rand(10, 20, 5, generator=torch.Generator().manual_seed(0)):
        average = 0.9 * average + 0.1 * values
        assert_close(sketch.update(rows, values, gain=0.1, decay=0.1), average)


def test_update_adds_up_by_default():
    sketch = CountMinSketch(None, 2, width=100)
    for _ in range(3):
        found = sketch.update(rows_of(4, 9), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert found.tolist() == [[3, 6], [9, 12]]


def test_repeated_rows_are_queried_as_the_sketch_was():
    sketch = CountSketch(None, 1, width=50)
    sketch.insert(rows_of(3), torch.tensor([[8.0]]))
    found = sketch.update(rows_of(3, 3), torch.tensor([[1.0], [2.0]]), decay=0.25)
    assert found.tolist() == [[8 + 1 + 2 - 2 - 2]] * 2


def test_count_min_never_underestimates_a_sum():
    sketch, total = CountMinSketch(500, 3, seed=5), torch.zeros(500, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(0, 500, (64,), generator=generator)
        values = torch.randint(0, 5, (64, 3), generator=generator).float()
        total.index_add_(0, rows, values)
        sketch.insert(rows, values)
    assert (sketch.query(torch.arange(500)) >= total).all()


def test_count_sketch_is_right_in_the_mean_over_seeds():
    """Each estimate's error is at most a bucket's collisions: its mean over 400 seeds is near 0."""
    values = torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    errors = []
    for seed in range(400):
        sketch = CountSketch(None, 1, width=20, depth=1, seed=seed)
        sketch.insert(torch.arange(60), values)
        errors.append(sketch.query(torch.arange(60)) - values)
    deviation = (values.square().sum() / 20 / 400).sqrt()  # of the mean, for a pairwise hash
    assert torch.stack(errors).mean(0).abs().max() < 4 * deviation


def test_merging_is_inserting_both():
    parts = [CountSketch(100, 4, seed=2) for _ in range(3)]
    values = torch.randint(-9, 9, (2, 30, 4), generator=torch.Generator().manual_seed(0)).float()
    rows = torch.arange(60).view(2, 30)
    for i in range(2):
        parts[i].insert(rows[i], values[i])
        parts[2].insert(rows[i], values[i])
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].values, parts[2].values)


def test_only_sketches_that_agree_can_be_merged():
    sketch = CountSketch(100, 4)
    with pytest.raises(ValueError, match=r"has seeds .*; allowed: .*the same `seed`"):
        sketch.merge(CountSketch(100, 4, seed=1))
    with pytest.raises(ValueError, match=r"\(3, 7, 5\); allowed: \(3, 7, 4\)"):
        sketch.merge(CountSketch(100, 5))
    with pytest.raises(ValueError, match="cannot merge a CountMinSketch into a CountSketch"):
        sketch.merge(CountMinSketch(100, 4))


def test_cleaning_multiplies():
    sketch = CountMinSketch(10, 2)
    sketch.insert(rows_of(1), torch.tensor([[4.0, 8.0]]))
    sketch.clean(0.25)
    assert sketch.query(rows_of(1)).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="clean_factor is 2; allowed: 0 to 1"):
        sketch.clean(2)


def test_bytes_are_those_of_the_tensors():
    sketch = CountSketch(1000, 40, depth=4)
    assert sketch.num_bytes == 4 * (4 * 50 * 40) + 8 * 4
    assert sketch.num_bytes == sum(t.nbytes for t in sketch.state_dict().values())


def test_a_saved_sketch_brings_its_hash(tmp_path):
    sketch, other = CountSketch(100, 4, seed=1), CountSketch(100, 4, seed=2)
    sketch.insert(rows_of(3), torch.ones(1, 4))
    torch.save(sketch.state_dict(), tmp_path / "sketch.pt")
    other.load_state_dict(torch.load(tmp_path / "sketch.pt", weights_only=True))
    assert torch.equal(other.query(rows_of(3)), torch.ones(1, 4))
    assert torch.equal(other.seeds, sketch.seeds)
    other.insert(rows_of(3), torch.ones(1, 4))
    assert torch.equal(sketch.query(rows_of(3)), torch.ones(1, 4)), "tensors are shared"
    with pytest.raises(ValueError, match=r"\(3, 7, 4\); allowed: \(3, 3, 4\)"):
        CountSketch(40, 4).load_state_dict(sketch.state_dict())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 6}, "depth is 6; allowed: an integer, 1 to 5"),
        ({"depth": True}, "depth is True; allowed: an integer, 1 to 5"),
        ({"size_ratio": 0.0}, "size_ratio is 0.0; allowed: above 0"),
        ({"width": 0}, "width is 0; allowed: an integer, 1 to"),
        ({"seed": -1}, "seed is -1; allowed: an integer, 0 to"),
        ({"num_rows": 2**31 + 1}, "num_rows is 2147483649; allowed: an integer, 0 to 2147483648"),
        ({"num_rows": None}, "neither num_rows nor width is given; give one of them"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        CountSketch(**{"num_rows": 10, "dim": 4, **sizes})
