"""One gradient entry that is NaN, infinite or huge, in every optimizer: what it reaches, and how far.

The rule: it reaches what it touches, as in torch, and what shares state with that; nothing hides it;
and where numbers stay finite, they move as if it had not been. Plain torch, C++ and CUDA (emulated)
have the same numbers. By construction: every exported class with every structure that it allows.
"""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch

import optim
from kernels import device, ops
from kernels.operands import PARAMETER_DTYPES
from kernels.reference import hash_rows
from optim.base import MomentOptimizer
from optim.moments import SEEDS
from optim.options import STRUCTURE_NAMES
from tests.emulation.emulator import Emulator
from tests.tolerances import assert_close
from tests.unit.kernels import cases
from tests.unit.optim.helpers import parameter

N, M = 30, 14
ROW, COLUMN = 14, 6
STEPS, BAD_STEP = 5, 2
BAD = (math.nan, math.inf, -math.inf, 2e19)
MODES = ("dense", "rows", "elements")
# Of an undisturbed run's farthest step. Dividing by eps would be ten million times that; a factored
# moment, of which a huge entry leaves nothing for others, is bounded by moments.factored_bound.
FARTHEST = 20
CHOICES = {
    "first_moment": ("full", "sketch"),
    "second_moment": STRUCTURE_NAMES,
    "variant": ("I", "II"),
    "betas": ((0.9, 0.999), (0.0, 0.999)),
    "momentum": (0.9, 0.0),
    "beta": (0.0, 0.9),
}


def every_optimizer():
    """Return name -> constructor, of each exported optimizer with all of its CHOICES."""
    makers = {}
    for name in optim.__all__:
        kind = getattr(optim, name)
        if not (inspect.isclass(kind) and issubclass(kind, MomentOptimizer)):
            continue
        choices = {k: v for k, v in CHOICES.items() if k in inspect.signature(kind).parameters}
        if MomentOptimizer not in kind.__bases__:  # another's structures are its defaults
            choices = {k: v for k, v in choices.items() if not k.endswith("_moment")}
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            makers[f"{name} {options}"] = partial(
                kind, lr=0.01, min_compressed_numel=0, size_ratio=0.6, **options
            ) if "depth" in inspect.signature(kind).parameters else partial(
                kind, lr=0.01, min_compressed_numel=0, **options
            )
    return makers


EVERY = every_optimizer()


def gradients(mode, dtype, bad):
    """Yield a few gradients; `bad` in one place of one of them, unless it is None."""
    generator = torch.Generator().manual_seed(1)
    for turn in range(STEPS):
        grad = torch.randn(N, M, generator=generator)
        if bad is not None and turn == BAD_STEP:
            grad[ROW, COLUMN] = bad
        grad = grad.to(dtype)
        rows = torch.arange(turn % 2, N, 2)
        if mode == "rows":
            grad = torch.sparse_coo_tensor(rows[None], grad[rows], (N, M), check_invariants=True)
        if mode == "elements":
            at = (torch.arange(N * M).view(N, M) + turn) % 3 == turn % 3
            at[ROW, COLUMN] = True
            grad = torch.sparse_coo_tensor(at.nonzero().T, grad[at], (N, M), check_invariants=True)
        yield grad


def arrived(grad):
    if not grad.is_sparse:
        return torch.ones(N, M, dtype=torch.bool)
    ones = torch.sparse_coo_tensor(grad._indices(), torch.ones(grad._values().shape), (N, M), check_invariants=True)
    return ones.to_dense() != 0


def follow(make, mode, dtype, bad):
    """Return the numbers (parameter and state) before the first step and after each."""
    p = parameter(N, M, dtype=dtype)
    optimizer = make([p])
    seen = []
    for grad in [None, *gradients(mode, dtype, bad)]:
        p.grad = grad
        optimizer.step()
        state = {k: v.clone() for k, v in optimizer.state[p].items()}
        seen.append({"param": p.detach().clone(), **state})
    return seen, optimizer


def reached(optimizer, state, bad, dtype, here):
    """Return the entries that must not be finite after the step in which `bad` arrives.

    here: (N, M), which arrive in that step.
    """
    group, only = optimizer.param_groups[0], torch.zeros(N, M, dtype=torch.bool)
    only[ROW, COLUMN] = True
    g = torch.tensor(bad).to(dtype).float()
    scalars = optimizer._scalars(group, BAD_STEP + 1)
    square = torch.tensor(scalars.get("second_gain", 1.0)) * g * g
    kind = (optimizer._second(group) or (None, None))[1]
    if kind == "factored" and not square.isfinite():
        return here
    if not g.isnan():
        return only if not g.isfinite() else ~here & here
    if kind == "cover" and group.get("variant") == "I":
        row, col = only.any(1, keepdim=True), only.any(0, keepdim=True)
        return here & (row if grad_is_of_rows(here) else row | col)
    if kind == "sketch":
        name = optimizer._second(group)[0]
        sketch = optim.CountMinSketch.wrap(state[name], state[name + SEEDS])
        buckets, _ = hash_rows(sketch.table, torch.arange(N))
        shares = (buckets == buckets[:, ROW : ROW + 1]).any(0)
        return here & only.any(0, keepdim=True) & shares[:, None]
    return only


def grad_is_of_rows(here):
    return not here.all() and bool((here.all(1) | ~here.any(1)).all())


@pytest.fixture
def implementations(monkeypatch):
    """Return contexts that run the operations on the CPU's tensors, by each implementation."""
    monkeypatch.setattr(device, "launcher", Emulator())

    class Emulated:
        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            self.patch.setattr(ops, "_run", lambda tensor: device)

        def __exit__(self, *_):
            self.patch.undo()

    return {"reference": partial(ops.use, "reference"), "C++": partial(ops.use, "native"), "CUDA": Emulated}


@pytest.mark.parametrize("mode", MODES)
def test_every_implementation_lets_it_reach_what_it_touches(implementations, mode):
    for turn, (name, make) in enumerate(EVERY.items()):
        for bad, dtype in zip(BAD, itertools.islice(itertools.cycle(PARAMETER_DTYPES), turn, None), strict=False):
            what = f"{name}, {dtype}, {bad}"
            runs = {}
            for which, implementation in implementations.items():
                with implementation():
                    runs[which], optimizer = follow(make, mode, dtype, bad)
            check_same(runs, "factored" in name or "FactoredAdam" in name, what)
            with ops.use("reference"):
                undisturbed, _ = follow(make, mode, dtype, None)
            check_reach(runs["reference"], undisturbed, optimizer, mode, dtype, bad, what)


def check_same(runs, is_factored, what):
    case = cases.Case("none", "factored" if is_factored else "none", "dense", (N, M))
    for which in ("C++", "CUDA"):
        for turn, (mine, theirs) in enumerate(zip(runs[which], runs["reference"], strict=True)):
            for name, tensor in theirs.items():
                if name.endswith(SEEDS):
                    continue
                cases.assert_same(mine[name], tensor, f"{what}: {name} of {which} after {turn}", case)


def check_reach(seen, undisturbed, optimizer, mode, dtype, bad, what):
    grads = list(gradients(mode, dtype, bad))
    here = arrived(grads[BAD_STEP])
    wanted = reached(optimizer, seen[BAD_STEP], bad, dtype, here)
    found = ~seen[BAD_STEP + 1]["param"].isfinite()
    assert torch.equal(found, wanted), f"{what}: {found.sum()} entries, not {wanted.sum()}"
    farthest = max(moved(undisturbed, turn).max() for turn in range(STEPS))
    others = torch.ones(N, M, dtype=torch.bool)
    others[ROW, COLUMN] = False
    for turn in range(BAD_STEP, STEPS):
        far = moved(seen, turn)[others]
        far = far[far.isfinite()]
        assert not (far > FARTHEST * farthest).any(), f"{what}: {far.max()}, not {farthest}, in {turn}"


def moved(seen, turn):
    before, after = (seen[k]["param"].float() for k in (turn, turn + 1))
    return (after - before).abs()


TORCH_S = {
    "Adam": (optim.Adam, torch.optim.Adam, {}),
    "Adam, beta1 = 0": (optim.Adam, torch.optim.Adam, {"betas": (0.0, 0.999)}),
    "Momentum": (optim.Momentum, torch.optim.SGD, {"momentum": 0.9}),
    "RMSprop": (optim.RMSprop, torch.optim.RMSprop, {}),
    "RMSprop with momentum": (optim.RMSprop, torch.optim.RMSprop, {"momentum": 0.9}),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", TORCH_S)
def test_full_state_is_torch_s(implementations, name):
    """On which numbers are not finite, and on the others' values."""
    ours, theirs, options = TORCH_S[name]
    for bad in (*BAD, 5e20):
        expected, _ = follow(partial(theirs, lr=0.01, **options), "dense", torch.float32, bad)
        for implementation in implementations.values():
            with implementation():
                seen, _ = follow(partial(ours, lr=0.01, **options), "dense", torch.float32, bad)
            for mine, other in zip(seen, expected, strict=True):
                for key in mine.keys() & other.keys():
                    is_finite = other[key].isfinite()
                    assert torch.equal(mine[key].isfinite(), is_finite), (bad, key)
                    assert_close(mine[key][is_finite], other[key][is_finite])
