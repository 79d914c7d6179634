import pytest
import torch
from torch import Generator

from dgc.sparsify import largest_indices, plan_sparsity, select_largest

SIZES = [1, 31, 32, 33, 1000, 1024, 1025, 4097, 50_000]


def select(values, density, seed=0, **settings):
    plan = plan_sparsity(values.numel(), density, **settings)
    return plan, select_largest(values, plan, generator=Generator().manual_seed(seed))


def oracle(values, k):
    """The k largest magnitudes that are not zero, ties to the lower index, by sorting a list."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    return sorted(i for i in order[:k] if values[i] != 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.99])
def test_exact_selection_is_the_sorted_one(size, density):
    values = torch.randn(size, generator=Generator().manual_seed(size))
    plan, indices = select(values, density, sample_ratio=1.0)
    assert indices.tolist() == oracle(values.tolist(), plan.k)


def test_ties_go_to_the_lower_index():
    values = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 2.0])
    assert largest_indices(values.abs(), 4).tolist() == [0, 1, 2, 5]


def test_zeros_are_never_selected():
    values = torch.zeros(10_000)
    values[[17, 9_999]] = torch.tensor([1e-20, -3.0])
    for sample_ratio in (0.01, 1.0):
        assert select(values, 0.01, sample_ratio=sample_ratio)[1].tolist() == [17, 9_999]
    assert select(torch.zeros(10_000), 0.01)[1].numel() == 0


@pytest.mark.parametrize("seed", range(20))
def test_sampled_count_stays_within_its_bounds(seed):
    values = torch.randn(100_000, generator=Generator().manual_seed(seed)) ** 3
    plan, indices = select(values, 0.001, seed)
    low, high = plan.k_bounds
    assert (plan.k, low, high) == (100, 80, 130)
    assert low <= indices.numel() <= high
    assert indices.diff().gt(0).all()


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_out_is_smaller_than_what_is_sent(seed):
    """The predecessors cut an overshoot by position, so that late large entries stayed behind."""
    values = torch.randn(100_000, generator=Generator().manual_seed(seed))
    _, indices = select(values, 0.001, seed)
    left = values.abs().clone()
    left[indices] = 0
    assert left.max() < values.abs()[indices].min()


def test_late_entries_are_as_likely_as_early_ones():
    from_last_tenth = total = 0
    for seed in range(60):
        values = torch.randn(20_000, generator=Generator().manual_seed(seed))
        _, indices = select(values, 0.005, seed)
        from_last_tenth += (indices >= 18_000).sum().item()
        total += indices.numel()
    assert 0.08 < from_last_tenth / total < 0.12  # 6,000 draws: 0.1 within 5 sigma of 0.004


def test_a_misleading_sample_is_corrected():
    """Few elements carry everything: most samples miss them and the threshold starts at zero."""
    values = torch.zeros(100_000)
    values[99_000:] = torch.arange(1.0, 1001.0)
    plan, indices = select(values, 0.001)
    low, high = plan.k_bounds
    assert low <= indices.numel() <= high
    assert indices.tolist() == list(range(100_000 - indices.numel(), 100_000))


def test_the_sample_is_of_the_size_the_paper_asks():
    assert plan_sparsity(1_000_000, 0.001).num_samples == 10_000  # 1% of the tensor
    assert plan_sparsity(100_000, 0.001).num_samples == 2_000  # 2 / density
    assert plan_sparsity(500, 0.001).num_samples == 500
    assert plan_sparsity(500, 0.001).k == 1


def test_a_plan_for_another_size_is_refused():
    plan = plan_sparsity(100, 0.1)
    with pytest.raises(ValueError, match="99 elements, its plan 100"):
        select_largest(torch.zeros(99), plan, generator=Generator())
