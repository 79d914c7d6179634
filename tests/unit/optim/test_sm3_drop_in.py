"""SM3 in torch-SM3's place: what the tests of that package (and of the paper's code) ask for.

Written anew; `Expected` is what both have: nu = beta min(accumulators) + (1 - beta) g^2 over NumPy
arrays. What differs by intention is in SM3's docstring, and here or in test_sm3.py.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch

from optim import SM3
from tests.unit.optim.helpers import gradients, parameter, row_sparse, step

DTYPES = [torch.float32, torch.float64]
GRADS = {
    "scalar": np.array(0.1),
    "vector": np.array([0.1, -0.3, 0.0]),
    "matrix": np.array([[0.1, 0.05], [0.02, -0.03], [0.0, 7.0]]),
    "of three axes": np.arange(-6.0, 6.0).reshape(2, 3, 2),
}
ROWS, SHAPE = [1, 3], (4, 2)
ROW_VALUES = np.array([[0.1, 0.05], [0.01, 1.5]])


class Expected:
    def __init__(self, x, axes, lr, momentum, beta):
        self.x, self.lr, self.momentum, self.beta = x.copy(), lr, momentum, beta
        self.accumulators = {k: np.zeros_like(np.amax(x, self._others(x, k), keepdims=True))
                             for k in axes}  # fmt: skip
        self.buffer = np.zeros_like(x)

    @staticmethod
    def _others(x, axis):
        return tuple(k for k in range(x.ndim) if k != axis)

    def step(self, grad):
        nu = np.broadcast_to(np.inf, grad.shape)
        for accumulator in self.accumulators.values():
            nu = np.minimum(nu, accumulator)
        kept, gain = (self.beta, 1 - self.beta) if self.beta else (1, 1)
        nu = kept * nu + gain * grad**2
        for axis in self.accumulators:
            self.accumulators[axis] = np.amax(nu, self._others(nu, axis), keepdims=True)
        update = np.where(nu > 0, grad / np.sqrt(np.where(nu > 0, nu, 1)), 0)
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * update
        self.x = self.x - self.lr * self.buffer


def assert_close(ours, expected):
    np.testing.assert_allclose(ours.detach().double().numpy().reshape(expected.shape), expected,
                               rtol=1e-5, atol=1e-8)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GRADS)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(("lr", "beta"), [(0.1, 0.0), (0.2, 0.1), (0.1, 0.3)])
def test_dense_steps(kind, lr, momentum, beta, dtype):
    grad = GRADS[kind]
    x = torch.full(grad.shape, 0.5, dtype=dtype)
    expected = Expected(np.full(grad.shape, 0.5), range(max(1, grad.ndim)), lr, momentum, beta)
    optimizer = SM3([x], lr, momentum, beta)
    x.grad = torch.from_numpy(grad).to(dtype)
    for _ in range(5):
        optimizer.step()
        expected.step(grad)
        assert_close(x, expected.x)
        for k, accumulator in expected.accumulators.items():
            assert_close(optimizer.state[x][f"accumulator_{k}"], accumulator)
        if momentum:
            assert_close(optimizer.state[x]["momentum_buffer"], expected.buffer)


def sparse(layout, values=ROW_VALUES):
    """The same rows of a gradient, as nn.Embedding gives them or element by element (torch-SM3)."""
    values = torch.from_numpy(values)
    if layout == "rows":
        return row_sparse(ROWS, values, SHAPE)
    at = torch.tensor([[1, 1, 3, 3], [0, 1, 0, 1]])
    return torch.sparse_coo_tensor(at, values.reshape(-1), SHAPE, check_invariants=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "elements"])
@pytest.mark.parametrize("lr, beta", [(0.1, 0), (0.1, 0.1), (0.2, 0.3), (0.3, 0.1), (0.1, 0.9)])
def test_sparse_steps_take_the_row_accumulator_alone(layout, lr, beta, dtype):
    var = np.array([[0.5, 0.05], [0.05, 1.0], [0.15, 3.0], [0.35, 2.0]])
    x = torch.from_numpy(var).to(dtype)
    x.grad = sparse(layout).to(dtype)
    expected = Expected(var[ROWS], [0], lr, 0.0, beta)
    optimizer = SM3([x], lr=lr, beta=beta)
    for _ in range(5):
        optimizer.step()
        expected.step(ROW_VALUES)
        var[ROWS] = expected.x
        assert_close(x, var)
        accumulators = np.zeros(4)
        accumulators[ROWS] = expected.accumulators[0].reshape(-1)
        assert_close(optimizer.state[x]["accumulator_0"], accumulators)


def test_what_comes_as_elements_of_a_step_takes_all_accumulators():
    """The rest of such a gradient is 0, so that a column's accumulator bounds what it seems to."""
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = SM3([p], lr=1.0)
    optimizer.step(elements={p: (torch.tensor([0, 3]), torch.tensor([3.0, 4.0]))})
    optimizer.step(elements={p: (torch.tensor([1]), torch.tensor([4.0]))})
    assert_close(p, np.array([[-1, -4 / 5], [0, -1]]))  # min(9, 16) + 16
    step(optimizer, p, torch.tensor([[0.0, 0.0], [4.0, 0.0]]).to_sparse())
    assert_close(p[1, 0], np.array(-(4 / 32**0.5)))  # 16, though the column's is 9


def test_repeated_indices_of_a_sparse_gradient_are_summed():
    p, q = parameter(*SHAPE), parameter(*SHAPE)
    twice = row_sparse([1, 3, 1], torch.tensor([[1.0, 2], [3, 4], [5, 6]]), SHAPE)
    for x, grad in ((p, twice), (q, twice.coalesce())):
        step(SM3([x]), x, grad)
    assert torch.equal(p, q)


def test_sparse_gradients_have_momentum_of_what_arrived():
    p = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = SM3([p], lr=1.0, momentum=0.5)
    for rows in ([1], [3], [1]):
        step(optimizer, p, row_sparse(rows, torch.ones(1, 2), SHAPE))
    buffer = optimizer.state[p]["momentum_buffer"]
    assert_close(buffer[3], np.array([0.5, 0.5]))
    assert_close(buffer[1], np.array([0.25 + 0.5 / 2**0.5] * 2))
    assert_close(p[1], -np.array([0.5 + 0.25 + 0.5 / 2**0.5] * 2))


def test_a_frozen_layer_is_passed_over():
    model = torch.nn.Sequential(torch.nn.Linear(10, 5), torch.nn.Linear(5, 1))
    model[0].weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 10)).square().sum().backward()
    SM3(model.parameters(), lr=0.1).step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_checkpoint_of_torch_sm3_with_a_row_cover_alone_goes_on_alike(momentum, beta):
    """Of sparse gradients, which it neither gives the other accumulators nor momentum."""
    rival = pytest.importorskip("SM3")
    p, theirs = parameter(*SHAPE, dtype=torch.float64), parameter(*SHAPE, dtype=torch.float64)
    optimizer, other = SM3([p]), rival.SM3([theirs], 0.3, momentum, beta)
    values = [ROW_VALUES * scale for scale in (1, -2, 3, 4)]  # squares rise, so that both rise
    for v in values[:2]:
        step(other, theirs, sparse("elements", v))
    optimizer.load_state_dict(other.state_dict())
    kept = optimizer.state[p]
    assert torch.equal(kept["accumulator_0"].view(-1), other.state[theirs]["accumulator_0"])
    assert (kept["accumulator_1"] == kept["accumulator_0"].max()).all()
    assert not momentum or not kept["momentum_buffer"].any()
    if momentum:
        return  # theirs ignores it where gradients are sparse
    with torch.no_grad():
        p.copy_(theirs)
    for v in values[2:]:
        step(optimizer, p, sparse("elements", v))
        step(other, theirs, sparse("elements", v))
    assert_close(p, theirs.detach().numpy())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_torch_sm3_goes_on_from_our_checkpoint_where_gradients_are_dense(momentum):
    rival = pytest.importorskip("SM3")
    p, theirs = parameter(4, 3), parameter(4, 3)
    optimizer, other = SM3([p], 0.3, momentum), rival.SM3([theirs])
    grads = list(gradients(6, 4, 3))
    for grad in grads[:3]:
        step(optimizer, p, grad)
    other.load_state_dict(deepcopy(optimizer.state_dict()))  # else it shares the tensors
    with torch.no_grad():
        theirs.copy_(p)
    for grad in grads[3:]:
        step(optimizer, p, grad)
        step(other, theirs, grad.clone())
    assert_close(p, theirs.detach().double().numpy())


def test_a_checkpoint_of_another_number_of_rows_is_refused():
    p = parameter(4, 3)
    optimizer = SM3([p])
    state = {0: {"step": 1, "momentum_buffer": 0.0, "accumulator_0": torch.ones(5)}}
    with pytest.raises(ValueError, match="accumulator_0': \\(5,\\).*for parameter 0; allowed"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_have_float32_state(dtype):
    optimizer = SM3([parameter(3, 4, dtype=dtype)], momentum=0.9)
    assert {t.dtype for t in next(iter(optimizer.state.values())).values()} == {torch.float32}
