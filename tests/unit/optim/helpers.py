"""What the tests of the optimizers share."""

from functools import partial

import torch

import optim
from optim.moments import SEEDS
from parsimony_kernels.step.reference_sketch import hash_rows

# Everything compressed that can be, with each kind of state; rates at which a few steps stay tame.
EVERY_OPTIMIZER = {
    "SM3": partial(optim.SM3, lr=0.1),
    "SM3 with momentum and beta": partial(optim.SM3, lr=0.1, momentum=0.9, beta=0.9),
    "SM3-I": partial(optim.SM3, lr=0.1, variant="I"),
    "SketchAdam": partial(optim.SketchAdam, lr=0.01, size_ratio=0.6),
    "SketchAdam, second only": partial(optim.SketchAdam, lr=0.01, first_moment="full"),
    "SketchAdam, beta1 = 0": partial(optim.SketchAdam, lr=0.01, betas=(0.0, 0.999)),
    "SM3Adam": partial(optim.SM3Adam, lr=0.01),
    "FactoredAdam": partial(optim.FactoredAdam, lr=0.01),
    "SketchAdagrad": partial(optim.SketchAdagrad, lr=0.1, clean_interval=3),
    "SketchRMSprop": partial(optim.SketchRMSprop, lr=0.01, momentum=0.9),
    "factored RMSprop": partial(optim.RMSprop, lr=0.01, second_moment="factored"),
    "SketchMomentum": partial(optim.SketchMomentum, lr=0.01),
    "Adam": partial(optim.Adam, lr=0.01),
    "Momentum": partial(optim.Momentum, lr=0.01),
}
EVERY_OPTIMIZER = {
    name: partial(make, min_compressed_numel=0) for name, make in EVERY_OPTIMIZER.items()
}


def parameter(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(values.to(dtype))


def gradients(num_steps, *shape, dtype=torch.float32, seed=1):
    """Gradients whose rows, and columns, differ in scale by up to 100."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(shape)
    for axis, size in enumerate(shape):
        steps = 10 ** torch.linspace(-1, 1, size)
        scale = scale * steps.view([-1 if k == axis else 1 for k in range(len(shape))])
    for _ in range(num_steps):
        yield (torch.randn(shape, generator=generator) * scale).to(dtype)


def step(optimizer, p, grad):
    p.grad = grad
    optimizer.step()


def row_sparse(rows, values, shape):
    return torch.sparse_coo_tensor(
        torch.as_tensor(rows)[None], values, shape, check_invariants=True
    )


def assert_no_collisions(optimizer, p):
    """Every sketch of a parameter's state has each row in a bucket of its own."""
    state, num_sketches = optimizer.state[p], 0
    for name in [name for name in state if name.endswith(SEEDS)]:
        sketch = optim.CountSketch.wrap(state[name.removesuffix(SEEDS)], state[name])
        for buckets in hash_rows(sketch.table, torch.arange(len(p)))[0]:
            assert len(buckets.unique()) == len(p)
        num_sketches += 1
    assert num_sketches


def unknown_entries(optimizer, p, name, doubt):
    """Return of which entries (n, m) of p a count-sketch's estimates say nothing."""
    state = optimizer.state[p]
    sketch = optim.CountSketch.wrap(state[name], state[name + SEEDS])
    buckets, signs = hash_rows(sketch.table, torch.arange(len(p)))
    found = sketch.values.flatten(0, 1)[buckets] * signs[:, :, None]
    return found.mean(0).square() < 0.99 * doubt * found.var(0) / len(found)


def copy_of_state(optimizer):
    return [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]


def assert_same_state(a, b):
    for mine, theirs in zip(a, b, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].dtype == theirs[name].dtype
            assert torch.equal(mine[name], theirs[name]), name
