import itertools
import math

import numpy as np
import pytest
import torch

from optim import SM3
from optim.matrix import balanced_split
from tests.tolerances import assert_close
from tests.unit.optim.helpers import gradients, parameter, row_sparse, step

SHAPES = [(), (5,), (1, 1), (4, 3), (3, 2, 4), (2, 3, 2, 2), (1, 6, 1, 2)]


def axis_cover(shape):
    """The sets of flat indices that SM3 takes: one for each index of each axis."""
    positions = list(itertools.product(*map(range, shape)))
    return [
        [flat for flat, position in enumerate(positions) if position[axis] == index]
        for axis, size in enumerate(shape)
        for index in range(size)
    ]


def matrix_cover(shape):
    matrix = (shape[0], math.prod(shape[1:]))
    return axis_cover(matrix)


class NaiveSM3:
    """The paper's listings, over sets; the sums and maxima are Python's, in float32."""

    def __init__(self, p, cover, lr=0.1, beta=0.0, momentum=0.0, variant="II"):
        self.x = p.detach().numpy().copy().reshape(-1)
        self.cover, self.variant = cover, variant
        self.lr, self.beta, self.momentum = lr, beta, momentum
        self.mu = np.zeros(len(cover), np.float32)
        self.buffer = np.zeros_like(self.x)

    def step(self, grad):
        g = grad.numpy().reshape(-1)
        keep, gain = (self.beta, 1 - self.beta) if self.beta else (1, 1)
        sets_of = [[r for r, s in enumerate(self.cover) if i in s] for i in range(len(g))]
        if self.variant == "I":
            for r, s in enumerate(self.cover):
                self.mu[r] = keep * self.mu[r] + gain * max(g[j] ** 2 for j in s)
            nu = [min(self.mu[r] for r in sets_of[i]) for i in range(len(g))]
        else:
            nu = [
                keep * min(self.mu[r] for r in sets_of[i]) + gain * g[i] ** 2 for i in range(len(g))
            ]
            for r, s in enumerate(self.cover):
                self.mu[r] = max(nu[j] for j in s)
        update = g / np.sqrt(np.maximum(np.array(nu, np.float32), 1e-30))
        if self.momentum:
            update = self.momentum * self.buffer + (1 - self.momentum) * update
            self.buffer = update
        self.x = (self.x - self.lr * update).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("momentum", "beta"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.9), (0.9, 0.5)])
def test_variant_two_is_the_paper_s_over_the_indices_of_each_axis(shape, momentum, beta):
    p = parameter(*shape)
    naive = NaiveSM3(p, axis_cover(shape) or [[0]], momentum=momentum, beta=beta)
    optimizer = SM3([p], momentum=momentum, beta=beta)
    for grad in gradients(6, *shape):
        step(optimizer, p, grad)
        naive.step(grad)
    assert_close(p.detach(), torch.from_numpy(naive.x).view(shape))
    kept = [v.reshape(-1) for k, v in optimizer.state[p].items() if k.startswith("accumulator")]
    assert_close(torch.cat(kept), torch.from_numpy(naive.mu))


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 4), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_variant_one_is_the_paper_s_over_explicit_sets(shape, beta):
    p = parameter(*shape)
    cover = matrix_cover(shape) if len(shape) > 1 else axis_cover(shape)
    naive = NaiveSM3(p, cover, beta=beta, variant="I")
    optimizer = SM3([p], variant="I", beta=beta)
    for grad in gradients(6, *shape):
        step(optimizer, p, grad)
        naive.step(grad)
    assert_close(p.detach(), torch.from_numpy(naive.x).view(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_torch_sm3_where_that_has_no_defect(shape, momentum):
    rival = pytest.importorskip("SM3")
    p, theirs = parameter(*shape), parameter(*shape)
    optimizer = SM3([p], 0.1, momentum)
    other = rival.SM3([theirs], 0.1, momentum)
    for grad in gradients(6, *shape):
        step(optimizer, p, grad)
        step(other, theirs, grad.clone())
    assert_close(p.detach(), theirs.detach())
    for name, value in other.state[theirs].items():
        if name.startswith("accumulator") or (momentum and name == "momentum_buffer"):
            assert_close(optimizer.state[p][name], value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoints_of_torch_sm3_are_taken_over(momentum):
    rival = pytest.importorskip("SM3")
    p, theirs = parameter(4, 3), parameter(4, 3)
    optimizer, other = SM3([p], 0.3, momentum), rival.SM3([theirs], 0.1, momentum)
    grads = list(gradients(6, 4, 3))
    for grad in grads[:3]:
        step(other, theirs, grad.clone())
    optimizer.load_state_dict(other.state_dict())
    with torch.no_grad():
        p.copy_(theirs)
    for grad in grads[3:]:
        step(optimizer, p, grad)
        step(other, theirs, grad.clone())
    assert_close(p.detach(), theirs.detach())
    assert optimizer.state[p]["step"] == 6
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_singleton_cover_is_adagrad():
    p, q = parameter(33), parameter(33)
    optimizer, adagrad = SM3([p], lr=0.1), torch.optim.Adagrad([q], lr=0.1, eps=0)
    for grad in gradients(8, 33):
        step(optimizer, p, grad)
        step(adagrad, q, grad.clone())
    assert_close(p.detach(), q.detach())
    assert_close(optimizer.state[p]["accumulator_0"], adagrad.state[q]["sum"])


def test_full_state_for_small_tensors_is_adagrad_too():
    p, q = parameter(4, 3), parameter(4, 3)
    optimizer = SM3([p], lr=0.1, min_compressed_numel=13)
    adagrad = torch.optim.Adagrad([q], lr=0.1, eps=0)
    for grad in gradients(8, 4, 3):
        step(optimizer, p, grad)
        step(adagrad, q, grad.clone())
    assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 2, 2)], ids=str)
def test_beta_forgets_a_large_gradient(variant, shape):
    """torch-SM3 keeps its accumulator at 10 for ever."""
    p = parameter(*shape)
    optimizer = SM3([p], beta=0.9, variant=variant)
    step(optimizer, p, torch.full(shape, 10.0))
    for _ in range(500):
        step(optimizer, p, torch.full(shape, 1e-3))
    assert_close(optimizer.estimate(p), torch.full(shape, 1e-6))


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 9)], ids=str)
def test_the_estimate_is_never_below_the_sum_of_squares(variant, shape):
    """With small integers as gradients, so that sums are exact, and every kind of gradient."""
    p, generator = parameter(*shape), torch.Generator().manual_seed(0)
    optimizer, total = SM3([p], variant=variant), torch.zeros(shape)
    for turn in range(30):
        grad = torch.randint(-3, 4, shape, generator=generator).float()
        if turn % 3 == 1:
            rows = torch.tensor([1, 4])
            grad[[0, 2, 3, 5]] = 0
            step(optimizer, p, row_sparse(rows, grad[rows], shape))
        elif turn % 3 == 2:
            grad *= torch.rand(shape, generator=generator) < 0.3
            step(optimizer, p, grad.to_sparse())
        else:
            step(optimizer, p, grad)
        total += grad**2
        assert (optimizer.estimate(p) >= total).all()


@pytest.mark.parametrize("shape", [(6, 5), (6, 1), (1, 4), (6, 2, 9)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_row_sparse_steps_leave_absent_rows_alone(shape, momentum):
    """torch-SM3 raises a shape error on matrices, and wipes absent rows of vectors."""
    p = parameter(*shape)
    optimizer = SM3([p], momentum=momentum)
    for grad in gradients(2, *shape):
        step(optimizer, p, grad)
    before, accumulators = p.detach().clone(), optimizer.state[p]["accumulator_0"].clone()
    buffer = optimizer.state[p].get("momentum_buffer", torch.zeros(shape)).clone()
    rows = torch.tensor([0, 3])[: 1 if shape[0] == 1 else 2]
    absent = [i for i in range(shape[0]) if i not in rows]
    step(optimizer, p, row_sparse(rows, torch.ones(len(rows), *shape[1:]), shape))
    assert torch.equal(p[absent], before[absent])
    assert (p[rows] != before[rows]).all()
    assert torch.equal(optimizer.state[p]["accumulator_0"][absent], accumulators[absent])
    after = optimizer.state[p].get("momentum_buffer", torch.zeros(shape))
    assert torch.equal(after[absent], buffer[absent])


def test_row_sparse_steps_use_the_row_accumulator_alone():
    p = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = SM3([p], lr=1.0)
    step(optimizer, p, row_sparse([1], torch.tensor([[3.0, 4.0]]), (3, 2)))
    assert_close(p.detach(), torch.tensor([[0.0, 0], [-1, -1], [0, 0]]))
    assert optimizer.state[p]["accumulator_0"].view(-1).tolist() == [0, 16, 0]
    assert optimizer.state[p]["accumulator_1"].view(-1).tolist() == [9, 16]
    step(optimizer, p, row_sparse([1], torch.tensor([[3.0, 0.0]]), (3, 2)))
    assert_close(p.detach()[1], torch.tensor([-1 - 3 / 5, -1]))
    assert optimizer.state[p]["accumulator_0"].view(-1).tolist() == [0, 25, 0]
    assert optimizer.state[p]["accumulator_1"].view(-1).tolist() == [25, 16]


@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_accumulators_that_others_share_only_rise_where_little_arrives(kind):
    """Rows forget when they arrive, so that the axes' accumulators no longer bound each other."""
    shape = (3, 3, 3, 3)
    p = parameter(*shape)
    optimizer = SM3([p], beta=0.5)
    step(optimizer, p, torch.full(shape, 10.0))
    for _ in range(4):
        step(optimizer, p, row_sparse([0, 1, 2], torch.full(shape, 0.1), shape))
    names = [f"accumulator_{k}" for k in range(4)]
    before = [optimizer.state[p][name].clone() for name in names]
    assert before[0].max() < 5 and all((b == 50).all() for b in before[1:])
    if kind == "rows":
        step(optimizer, p, row_sparse([1], torch.full((1, 3, 3, 3), 0.1), shape))
        names, before = names[1:], before[1:]
    else:
        optimizer.zero_grad()
        optimizer.step(elements={p: (torch.tensor([40]), torch.tensor([0.1]))})
    assert all(torch.equal(optimizer.state[p][n], b) for n, b in zip(names, before, strict=True))


def test_sparse_vectors_keep_absent_entries():
    p, q = parameter(6), parameter(6)
    optimizer, adagrad = SM3([p], lr=0.1), torch.optim.Adagrad([q], lr=0.1, eps=0)
    for grad in gradients(4, 6):
        grad[[1, 3]] = 0
        step(optimizer, p, grad.to_sparse())
        step(adagrad, q, grad.clone())
        grad[[1, 3]] = 1
        step(optimizer, p, grad)
        step(adagrad, q, grad.clone())
    assert_close(p[[0, 2, 4, 5]].detach(), q[[0, 2, 4, 5]].detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_gradients_in_half_precision_are_not_nan(dtype):
    """torch-SM3's eps is 0 in float16, and 0 / 0 not a number."""
    p = parameter(3, 4, dtype=dtype)
    before = p.detach().clone()
    step(SM3([p]), p, torch.zeros_like(p))
    assert torch.equal(p, before)


def test_state_has_the_sizes_of_the_axes():
    p = parameter(8, 3, 5, 7)
    optimizer = SM3([p], momentum=0.9)
    assert {k: tuple(v.shape) for k, v in optimizer.state[p].items()} == {
        "step": (),
        "momentum_buffer": (8, 3, 5, 7),
        "accumulator_0": (8, 1, 1, 1),
        "accumulator_1": (1, 3, 1, 1),
        "accumulator_2": (1, 1, 5, 1),
        "accumulator_3": (1, 1, 1, 7),
    }
    assert SM3([p]).num_bytes == 4 * (1 + 8 + 3 + 5 + 7)


def test_the_matrix_is_as_square_as_axes_allow():
    assert balanced_split((64, 3, 7, 7)) == 1
    assert balanced_split((8, 8, 8, 8)) == 2
    assert balanced_split((2, 3, 100)) == 2
    assert [balanced_split(shape) for shape in [(), (5,), (3, 4)]] == [0, 0, 1]
