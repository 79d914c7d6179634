"""One gradient entry that is NaN, infinite or huge, in every optimizer: what it reaches, how far.

The rule: it reaches what it touches, as in torch, and what shares state with that; nothing hides
it; and what stays finite moves no further than else. Plain torch, C++ and CUDA (emulated) have the
same numbers. By construction: every exported class with every structure that it allows.
"""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch

import optim
from optim.base import MomentOptimizer
from optim.moments import SEEDS
from optim.options import STRUCTURE_NAMES
from parsimony_kernels.runtime import launch
from parsimony_kernels.runtime.operands import PARAMETER_DTYPES
from parsimony_kernels.step import device, ops
from parsimony_kernels.step.reference_sketch import hash_rows
from tests.emulation.emulator import Emulator
from tests.tolerances import assert_close
from tests.unit.optim.helpers import parameter
from tests.unit.parsimony_kernels import cases

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
    exported = (getattr(optim, name) for name in optim.__all__)
    makers = {}
    for kind in exported:
        if not (inspect.isclass(kind) and issubclass(kind, MomentOptimizer)):
            continue
        known = inspect.signature(kind).parameters
        choices = {name: values for name, values in CHOICES.items() if name in known}
        if MomentOptimizer not in kind.__bases__:  # its structures are defaults; its parent has all
            choices = {k: v for k, v in choices.items() if not k.endswith("_moment")}
        fixed = {"lr": 0.01, "min_compressed_numel": 0}
        fixed |= {"size_ratio": 0.6} if "size_ratio" in known else {}
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            makers[f"{kind.__name__} {options}"] = partial(kind, **fixed, **options)
    return makers


EVERY = every_optimizer()


def arrivals(mode, turn):
    """Return which entries (N, M) arrive in a step; always the one that will be bad."""
    here = torch.ones(N, M, dtype=torch.bool)
    if mode == "rows":
        here[1 - ROW % 2 :: 2] = turn % 2 == 1
        here[ROW] = True
    if mode == "elements":
        here = (torch.arange(N * M).view(N, M) + turn) % 3 == 0
        here[ROW, COLUMN] = True
    return here


def gradients(mode, dtype, bad):
    """Yield a few gradients; `bad` in one place of one of them, unless it is None."""
    generator = torch.Generator().manual_seed(1)
    for turn in range(STEPS):
        grad, here = torch.randn(N, M, generator=generator), arrivals(mode, turn)
        if bad is not None and turn == BAD_STEP:
            grad[ROW, COLUMN] = bad
        grad = grad.to(dtype)
        if mode == "rows":
            rows = here.all(1).nonzero()[:, 0]
            grad = torch.sparse_coo_tensor(rows[None], grad[rows], (N, M), check_invariants=True)
        if mode == "elements":
            places = here.nonzero().T
            grad = torch.sparse_coo_tensor(places, grad[here], (N, M), check_invariants=True)
        yield grad


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


def reached(optimizer, mode, dtype, bad):
    """Return the entries that must not be finite after the step in which `bad` arrives."""
    here, only = arrivals(mode, BAD_STEP), torch.zeros(N, M, dtype=torch.bool)
    only[ROW, COLUMN] = True
    group, g = optimizer.param_groups[0], torch.tensor(bad).to(dtype).float()
    gain = optimizer._scalars(group, BAD_STEP + 1).get("second_gain", 1.0)
    _, kind = optimizer._second(group) or (None, None)
    if kind == "factored" and not (gain * g * g).isfinite():
        return here
    if g.isinf():
        return only  # the minimum of accumulators, or of buckets, is another's
    if not g.isnan():
        return torch.zeros_like(only)
    in_column = here & only.any(0, keepdim=True)
    if kind == "cover" and group.get("variant") == "I":  # accumulators are raised before the step
        in_row = here & only.any(1, keepdim=True)
        return in_row if mode == "rows" else in_row | in_column
    return only  # of a sketch too, whose estimates are of before the step


def shares_bucket(state, name):
    """Return which rows (N, 1) have one of ROW's buckets in a sketch."""
    sketch = optim.CountMinSketch.wrap(state[name], state[name + SEEDS])
    buckets, _ = hash_rows(sketch.table, torch.arange(N))
    return (buckets == buckets[:, ROW : ROW + 1]).any(0)[:, None]


def may_follow(optimizer, state):
    """Return the entries that may move as far as the bad one does: itself; and without a second
    moment to divide by, what a sketch of the first cannot tell from it."""
    group, only = optimizer.param_groups[0], torch.zeros(N, M, dtype=torch.bool)
    only[ROW, COLUMN] = True
    name, kind = optimizer._first(group) or (None, None)
    if kind == "sketch" and not optimizer.has_second_moment:
        return only.any(0, keepdim=True) & shares_bucket(state, name)
    return only


@pytest.fixture
def implementations(monkeypatch):
    """Return contexts that run the operations on the CPU's tensors, by each implementation."""
    monkeypatch.setattr(launch, "launcher", Emulator())

    class Emulated:
        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            self.patch.setattr(ops, "_run", lambda tensor: device)

        def __exit__(self, *_):
            self.patch.undo()

    use = ops.use
    return {"reference": partial(use, "reference"), "C++": partial(use, "native"), "CUDA": Emulated}


@pytest.mark.parametrize("mode", MODES)
def test_every_implementation_lets_it_reach_what_it_touches(implementations, mode):
    for turn, (name, make) in enumerate(EVERY.items(), MODES.index(mode)):
        for number, bad in enumerate(BAD, turn):
            dtype = PARAMETER_DTYPES[number % len(PARAMETER_DTYPES)]
            what, runs = f"{name}, {dtype}, {bad}", {}
            for which, implementation in implementations.items():
                with implementation():
                    runs[which], optimizer = follow(make, mode, dtype, bad)
            check_same(runs, "actored" in name, what)
            with ops.use("reference"):
                undisturbed, _ = follow(make, mode, dtype, None)
            wanted = reached(optimizer, mode, dtype, bad)
            following = may_follow(optimizer, undisturbed[-1])
            check_reach(runs["reference"], undisturbed, wanted, following, what)


def check_same(runs, is_factored, what):
    case = cases.Case("none", "factored" if is_factored else "none", "dense", (N, M))
    for which in ("C++", "CUDA"):
        for turn, (mine, theirs) in enumerate(zip(runs[which], runs["reference"], strict=True)):
            for name, tensor in theirs.items():
                if name.endswith(SEEDS):
                    continue
                where = f"{what}: {name} of {which} after {turn}"
                cases.assert_same(mine[name], tensor, where, case)


def check_reach(seen, undisturbed, wanted, following, what):
    found = ~seen[BAD_STEP + 1]["param"].isfinite()
    assert torch.equal(found, wanted), f"{what}: {found.sum()} entries, not {wanted.sum()}"
    farthest = FARTHEST * max(moved(undisturbed, turn).max() for turn in range(STEPS))
    for turn in range(BAD_STEP, STEPS):
        distances = moved(seen, turn)
        distances[following] = 0.0
        assert not (distances > farthest).any(), f"{what}: {distances.max()} in step {turn}"


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
