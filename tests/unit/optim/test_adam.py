import numpy as np
import pytest
import torch

from optim import Adam, FactoredAdam, SketchAdam, SM3Adam
from tests.tolerances import assert_close
from tests.unit.optim.helpers import (
    assert_no_collisions,
    gradients,
    parameter,
    row_sparse,
    step,
    unknown_entries,
)

COLLISION_FREE = {"width": 5000, "min_compressed_numel": 0}
SHAPES = [(12, 5), (12, 1), (6, 2, 3)]


def follow(optimizer, p, other, q, grads):
    """Step both with the same gradients, and see that the parameters stay together."""
    for grad in grads:
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_state_is_torch_s_adam(shape, betas, dtype):
    """16-bit parameters: the other runs in float32 and is rounded after every step."""
    p, q = parameter(*shape, dtype=dtype), parameter(*shape)
    optimizer, other = Adam([p], 0.01, betas), torch.optim.Adam([q], 0.01, betas)
    for grad in gradients(8, *shape, dtype=dtype):
        with torch.no_grad():
            q.copy_(p.float())
        step(optimizer, p, grad)
        step(other, q, grad.float())
        assert_close(p.detach(), q.detach().to(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first_moment", ["sketch", "full"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_sketch_without_collisions_is_torch_s_adam(shape, first_moment, betas, depth):
    p, q = parameter(*shape), parameter(*shape)
    options = {"first_moment": first_moment, "depth": depth, **COLLISION_FREE}
    optimizer = SketchAdam([p], 0.01, betas, **options)
    assert_no_collisions(optimizer, p)
    follow(optimizer, p, torch.optim.Adam([q], 0.01, betas), q, gradients(8, *shape))


def test_a_sketch_without_collisions_is_sparse_adam():
    p, q = parameter(12, 5), parameter(12, 5)
    optimizer = SketchAdam([p], 0.01, **COLLISION_FREE)
    assert_no_collisions(optimizer, p)
    generator = torch.Generator().manual_seed(0)
    grads = [
        row_sparse(torch.randint(0, 12, (6,), generator=generator), values, (12, 5))
        for values in gradients(8, 6, 5)
    ]
    follow(optimizer, p, torch.optim.SparseAdam([q], 0.01), q, grads)


@pytest.mark.parametrize("make", [SM3Adam, FactoredAdam])
def test_vectors_have_torch_s_adam_whatever_the_structure(make):
    p, q = parameter(33), parameter(33)
    follow(make([p], 0.01), p, torch.optim.Adam([q], 0.01), q, gradients(8, 33))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_adam_is_that_of_numpy(betas, shape):
    p, matrix = parameter(*shape), (shape[0], -1)
    x = p.detach().numpy().astype(np.float64).reshape(matrix)
    m, row, col = np.zeros_like(x), np.zeros(x.shape[0]), np.zeros(x.shape[1])
    optimizer = FactoredAdam([p], 0.01, betas, min_compressed_numel=0)
    for turn, grad in enumerate(gradients(8, *shape), 1):
        step(optimizer, p, grad)
        g = grad.numpy().astype(np.float64).reshape(matrix)
        m = betas[0] * m + (1 - betas[0]) * g
        row = betas[1] * row + (1 - betas[1]) * (g**2).mean(1)
        col = betas[1] * col + (1 - betas[1]) * (g**2).mean(0)
        nu = np.outer(row, col) / row.mean() / (1 - betas[1] ** turn)
        x -= 0.01 * m / (1 - betas[0] ** turn) / (np.sqrt(nu) + 1e-8)
    assert_close(p.detach(), torch.from_numpy(x).float().view(shape))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4)], ids=str)
def test_sm3_adam_is_that_of_numpy(shape):
    p = parameter(*shape)
    x, m = p.detach().numpy().astype(np.float64), np.zeros(shape)
    accumulators = [np.zeros([n if k == a else 1 for k, n in enumerate(shape)])
                    for a in range(len(shape))]  # fmt: skip
    optimizer = SM3Adam([p], 0.01, min_compressed_numel=0)
    for turn, grad in enumerate(gradients(8, *shape), 1):
        step(optimizer, p, grad)
        g = grad.numpy().astype(np.float64)
        m = 0.9 * m + 0.1 * g
        least = np.broadcast_to(accumulators[0], shape)
        for accumulator in accumulators[1:]:
            least = np.minimum(least, accumulator)
        nu = 0.999 * least + 0.001 * g**2
        for axis in range(len(shape)):
            others = tuple(k for k in range(len(shape)) if k != axis)
            accumulators[axis] = nu.max(others, keepdims=True)
        x -= 0.01 * m / (1 - 0.9**turn) / (np.sqrt(nu / (1 - 0.999**turn)) + 1e-8)
    assert_close(p.detach(), torch.from_numpy(x).float())


def test_beta1_zero_keeps_no_first_moment():
    optimizer = SketchAdam([parameter(8, 3)], betas=(0.0, 0.999), min_compressed_numel=0)
    (state,) = optimizer.state.values()
    assert set(state) == {"step", "exp_avg_sq", "exp_avg_sq_seeds"}


def test_the_names_of_state_are_torch_s_where_it_is_full():
    p, q = parameter(8, 3), parameter(8, 3)
    optimizer, other = Adam([p]), torch.optim.Adam([q])
    follow(optimizer, p, other, q, gradients(2, 8, 3))
    for name, value in other.state[q].items():
        assert_close(optimizer.state[p][name], value)
    assert optimizer.state[p].keys() == other.state[q].keys()


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_weight_decay_and_maximize_are_torch_s(decoupled, maximize, lr):
    p, q = parameter(5, 3), parameter(5, 3)
    ours = Adam([p], lr, weight_decay=0.1, decoupled_weight_decay=decoupled, maximize=maximize)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    other = kind([q], lr, weight_decay=0.1, maximize=maximize)
    follow(ours, p, other, q, gradients(8, 5, 3))


def largest_quotient(betas, step, **moments):
    optimizer = Adam([parameter(70, 70)], 0.01, betas, **moments)
    return optimizer._scalars(optimizer.param_groups[0], step).get("largest_quotient")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.25), (0.9, 0.5)])
@pytest.mark.parametrize("num_steps", [1, 2, 30])
def test_the_bound_of_a_sketched_step_is_the_most_that_exact_moments_reach(betas, num_steps):
    """The worst history has gradients in proportion to (beta1 / beta2)^age."""
    bound = largest_quotient(betas, num_steps, second_moment="sketch")
    generator = np.random.default_rng(0)
    worst = (betas[0] / betas[1]) ** np.arange(num_steps)[::-1]
    reached = []
    for history in [worst, *generator.standard_cauchy((100, num_steps))]:
        m = v = 0.0
        for g in history:
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        scales = np.sqrt(1 - betas[1] ** num_steps) / (1 - betas[0] ** num_steps)
        reached.append(abs(m) / np.sqrt(v) * scales)
    assert max(reached) <= bound <= 1.0011 * reached[0]


def test_steps_without_sketches_or_factors_are_not_bounded():
    assert largest_quotient((0.9, 0.999), 5) is None
    assert largest_quotient((0.9, 0.999), 5, second_moment="cover") is None
    assert largest_quotient((0.9, 0.0), 5, second_moment="sketch") is None


@pytest.mark.parametrize("first_moment", ["full", "sketch"])
def test_a_factored_step_is_bounded_as_exact_ones_are_or_a_little_wider(first_moment):
    for betas in ((0.9, 0.999), (0.0, 0.9), (0.0, 0.0), (0.0, 0.9999)):
        moments = {"first_moment": first_moment, "second_moment": "factored"}
        exact = largest_quotient(betas, 10**6, second_moment="sketch")
        assert largest_quotient(betas, 1, **moments) == pytest.approx(max(exact, 16.0))
    assert largest_quotient((0.9, 0.5), 1, **moments) is None  # nothing bounds an exact one


@pytest.mark.parametrize("betas", [(0.9, 0.5), (0.99, 0.95), (0.9, 0.81)])
def test_a_bound_beyond_all_numbers_is_none(betas):
    for num_steps in (100, 5_000, 1_000_000):
        bound = largest_quotient(betas, num_steps, second_moment="sketch")
        assert bound is None or 0 < bound < 3e38


def test_a_rare_row_among_frequent_ones_moves_no_further_than_exact_state_could_move_it():
    """Without the bound, a language model diverged with sketches of half the size and more."""
    p = parameter(40, 8)
    optimizer = SketchAdam([p], 1.0, size_ratio=1.0, min_compressed_numel=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(20, generator=generator)[:10]
        step(optimizer, p, row_sparse(rows, torch.randn(10, 8, generator=generator), (40, 8)))
    before = p.detach().clone()
    rare = torch.arange(20, 40)
    tiny = 1e-4 * torch.randn(20, 8, generator=generator)
    step(optimizer, p, row_sparse(rare, tiny, (40, 8)))
    moved = (p.detach() - before)[rare].abs()
    bound = largest_quotient((0.9, 0.999), 31, second_moment="sketch")
    assert 0.99 * bound < moved.max() <= 1.001 * bound


def test_where_estimates_disagree_a_rare_row_among_frequent_ones_goes_down_its_own_gradient():
    """The average after the insertions would be the frequent rows': its direction is noise."""
    p = parameter(40, 8)
    optimizer = SketchAdam([p], 1.0, size_ratio=1.0, min_compressed_numel=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows = torch.randperm(20, generator=generator)[:10]
        step(optimizer, p, row_sparse(rows, torch.randn(10, 8, generator=generator), (40, 8)))
    before, rare = p.detach().clone(), torch.arange(20, 40)
    unknown = unknown_entries(optimizer, p, "exp_avg", doubt=9)[rare]
    tiny = 1e-4 * torch.randn(20, 8, generator=generator)
    step(optimizer, p, row_sparse(rare, tiny, (40, 8)))
    moved = (p.detach() - before)[rare]
    assert unknown.sum() > 50
    assert (moved * tiny < 0)[unknown].all()
