"""float64 parameters: state and arithmetic are float64, and nothing is rounded to less."""

import copy
from functools import partial

import pytest
import torch

import optim
from optim import SM3, Adam, CountMinSketch, CountSketch
from parsimony_kernels.step import ops
from tests.tolerances import assert_close
from tests.unit.optim.helpers import (
    EVERY_OPTIMIZER,
    assert_same_state,
    copy_of_state,
    gradients,
    parameter,
    row_sparse,
    step,
)

F64 = torch.float64
SHAPES = [(), (5,), (12, 5), (6, 2, 3)]
every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)
parameter64 = partial(parameter, dtype=F64)
# Of small steps of Adam's kind the float32 run is wrong by this much; of sums it is less.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}


def precise(num_steps, *shape, seed=1):
    """Gradients that float32 cannot hold."""
    for grad in gradients(num_steps, *shape, dtype=F64, seed=seed):
        yield grad / 3


# ---- as the optimizers of torch, and of the package torch-SM3 ------------------------------------

WIDE = {"width": 5000, "min_compressed_numel": 0}  # no two rows share a bucket
NESTED = {"weight_decay": 0.1, "maximize": True}
RIVALS = {
    "Adam": (optim.Adam, torch.optim.Adam, NESTED, {}),
    "AdamW": (partial(optim.Adam, decoupled_weight_decay=True), torch.optim.AdamW, NESTED, {}),
    "Adam without momentum": (optim.Adam, torch.optim.Adam, {"betas": (0.0, 0.9)}, {}),
    "SketchAdam": (optim.SketchAdam, torch.optim.Adam, {}, WIDE),
    "RMSprop": (optim.RMSprop, torch.optim.RMSprop, {"momentum": 0.9}, {}),
    "SketchRMSprop": (optim.SketchRMSprop, torch.optim.RMSprop, {}, WIDE),
    "Adagrad": (optim.Adagrad, torch.optim.Adagrad, {"weight_decay": 0.1}, {}),
    "SketchAdagrad": (optim.SketchAdagrad, torch.optim.Adagrad, {}, WIDE),
    "Momentum": (optim.Momentum, torch.optim.SGD, {"momentum": 0.9, **NESTED}, {}),
    "SketchMomentum": (optim.SketchMomentum, torch.optim.SGD, {"momentum": 0.9}, WIDE),
}


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_nothing_is_compressed_it_is_torch_s_in_float64(name, shape):
    ours, theirs, options, more = RIVALS[name]
    p, q = parameter64(*shape), parameter64(*shape)
    lr = torch.tensor(0.01, dtype=F64)
    optimizer, other = ours([p], lr, **options, **more), theirs([q], 0.01, **options)
    for grad in precise(8, *shape):
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize(("name", "rival"), [("SketchAdam", torch.optim.SparseAdam),
                                             ("SketchAdagrad", torch.optim.Adagrad)])  # fmt: skip
def test_rows_are_torch_s_in_float64(name, rival):
    p, q = parameter64(12, 5), parameter64(12, 5)
    eps = {"eps": 1e-30}  # SparseAdam adds it before it corrects for the bias
    optimizer, other = RIVALS[name][0]([p], 0.01, **eps, **WIDE), rival([q], 0.01, **eps)
    generator = torch.Generator().manual_seed(0)
    for values in precise(8, 6, 5):
        grad = row_sparse(torch.randint(0, 12, (6,), generator=generator), values, (12, 5))
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("lr", "momentum", "beta"),
    [(0.1, 0.0, 0.0), (0.1, 0.1, 0.0), (0.1, 0.0, 0.1), (0.2, 0.3, 0.1), (0.3, 0.1, 0.9)],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_it_is_torch_sm3_in_float64(shape, lr, momentum, beta, requires_grad):
    """With beta theirs is the paper's only while gradients do not fall: here they stay."""
    rival = pytest.importorskip("SM3")
    p, q = (parameter64(*shape).requires_grad_(requires_grad) for _ in range(2))
    optimizer, other = (make([x], lr, momentum, beta) for make, x in ((SM3, p), (rival.SM3, q)))
    grads = list(precise(5, *shape))
    for grad in grads[:1] * 5 if beta else grads:
        step(optimizer, p, grad)
        step(other, q, grad.clone())
        assert_close(p.detach(), q.detach())
        for name, value in other.state[q].items():
            if name.startswith("accumulator") or (momentum and name == "momentum_buffer"):
                assert_close(optimizer.state[p][name], value)


# ---- no cast on the way, whatever the structure --------------------------------------------------


def arrive(optimizer, p, grad, kind):
    """Step with a gradient of which all, some rows or some elements are there."""
    if kind == "dense":
        return step(optimizer, p, grad)
    if kind == "rows":
        return step(optimizer, p, row_sparse([1, 4], grad[[1, 4]], p.shape))
    if kind == "coo":
        return step(optimizer, p, (grad * (grad > 0)).to_sparse())
    indices = torch.arange(0, grad.numel(), 3)
    p.grad = None
    return optimizer.step(elements={p: (indices, grad.reshape(-1)[indices])})


KINDS = ("dense", "rows", "coo", "elements")


def run(name, shape, dtype=F64, scale=1.0, **options):
    p = parameter(*shape, dtype=dtype)
    optimizer = EVERY_OPTIMIZER[name]([p], **options)
    for turn, grad in enumerate(precise(8, *shape)):
        arrive(optimizer, p, (grad * scale).to(dtype), KINDS[turn % 4])
    return optimizer, p


@every_optimizer
@pytest.mark.parametrize("shape", [(12, 5), (6, 2, 9)], ids=str)
def test_it_is_the_float32_run_but_for_that_one_s_rounding(name, shape):
    (optimizer, p), (single, q) = run(name, shape), run(name, shape, torch.float32)
    torch.testing.assert_close(p.detach().float(), q.detach(), **FLOAT32)
    assert not torch.equal(p.detach().float(), q.detach())
    for key, value in optimizer.state[p].items():
        kept = single.state[q][key]
        assert value.dtype == (F64 if key != "step" and "_seeds" not in key else kept.dtype)
        if "_seeds" not in key:
            torch.testing.assert_close(value.float(), kept, rtol=1e-3, atol=1e-4)
        if value.dtype == F64:
            assert (value.float().double() != value).any(), f"{key} holds float32's numbers"
    assert (p.detach().float().double() != p.detach()).float().mean() > 0.9


@every_optimizer
@pytest.mark.parametrize("exponent", [300, -300])
def test_numbers_beyond_float32_take_the_same_steps(name, exponent):
    """Without eps a step does not depend on the gradients' scale; what is cast on its way does.

    Powers of two scale to the bit; what is not scaled by the second moment scales the rate instead.
    """
    scale = 2.0**exponent
    options = {} if "eps" not in EVERY_OPTIMIZER[name]([parameter(2, 2)]).defaults else {"eps": 0.0}
    other = dict(options) if options else {"lr": 0.01 / scale}
    (_, p), (_, q) = run(name, (12, 5), **options), run(name, (12, 5), scale=scale, **other)
    assert_close(p.detach(), q.detach())


@every_optimizer
def test_plain_torch_steps_float64_whatever_implementation_is_chosen(name):
    with ops.use("reference"):
        chosen, p = run(name, (12, 5))
    native, q = run(name, (12, 5))
    assert torch.equal(p, q)
    assert_same_state(copy_of_state(chosen), copy_of_state(native))


@every_optimizer
def test_scale_and_parts_reach_the_second_moment_in_float64(name):
    p = parameter64(12, 5)
    apart, whole = (EVERY_OPTIMIZER[name]([q]).delegate_second_moment(q)
                    for q in (p, parameter64(12, 5)))  # fmt: skip
    if apart is None:
        return
    for grad in precise(3, 12, 5):
        scale = torch.tensor([1 / 3], dtype=F64)
        apart.observe(grad.view(-1) * 3e60, scale=scale / 1e60, num_parts=1, is_first=True)
        whole.observe(grad.view(-1), scale=None, num_parts=1, is_first=True)
    assert apart.root().dtype == apart.root(torch.tensor([3])).dtype == F64
    assert_close(apart.root(), whole.root())
    assert_close(apart.root(torch.tensor([3, 7])), whole.root()[[3, 7]])


# ---- checkpoints, and parameters that change -----------------------------------------------------


@every_optimizer
@pytest.mark.parametrize(("saved_in", "taken_up_in"), [(F64, F64), (F64, torch.float32),
                                                       (torch.float32, F64)])  # fmt: skip
def test_checkpoints_are_taken_up_in_the_dtype_of_the_parameter(name, saved_in, taken_up_in):
    source, p = run(name, (12, 5), saved_in)
    q = torch.nn.Parameter(p.detach().to(taken_up_in))
    optimizer = EVERY_OPTIMIZER[name]([q])
    optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    expected = {
        key: value if key == "step" or key.endswith("_seeds") else value.to(taken_up_in)
        for key, value in source.state[p].items()
    }
    assert_same_state([optimizer.state[q]], [expected])
    (grad,) = precise(1, 12, 5, seed=9)
    step(optimizer, q, grad.to(taken_up_in))
    step(source, p, grad.to(saved_in))
    torch.testing.assert_close(q.detach().double(), p.detach().double(), **FLOAT32)
    assert (saved_in, taken_up_in) != (F64, F64) or torch.equal(p, q)


@every_optimizer
def test_state_follows_a_parameter_to_float64_and_back(name):
    """As `model.double()` does; without another step, float64 and back changes no bit."""
    p, q = parameter(12, 5), parameter(12, 5)
    optimizer, other = EVERY_OPTIMIZER[name]([p]), EVERY_OPTIMIZER[name]([q])
    first, second, third = precise(3, 12, 5)
    for mine, x in ((optimizer, p), (other, q)):
        step(mine, x, first.float())
    p.grad, p.data = None, p.data.double()
    step(optimizer, p, second)
    step(other, q, second.float())
    torch.testing.assert_close(p.detach().float(), q.detach(), **FLOAT32)
    p.grad, p.data = None, p.data.float()
    step(optimizer, p, third.float())
    assert {v.dtype for k, v in optimizer.state[p].items() if "_seeds" not in k} == {torch.float32}


def test_sizes_are_those_of_float64():
    sizes = {name: EVERY_OPTIMIZER[name]([parameter64(300, 100)]).num_bytes
             for name in ("SketchAdam, beta1 = 0", "FactoredAdam", "SM3", "Adam")}  # fmt: skip
    assert sizes == {
        "SketchAdam, beta1 = 0": 4 + 8 * 3 * 20 * 100 + 8 * 3,
        "FactoredAdam": 4 + 8 * (300 * 100 + 300 + 100),
        "SM3": 4 + 8 * (300 + 100),
        "Adam": 4 + 8 * 2 * 300 * 100,
    }


def test_elements_are_in_the_state_s_dtype():
    for p, wrong in ((parameter64(3, 4), torch.float32), (parameter(3, 4), F64)):
        optimizer = Adam([p])
        with pytest.raises(ValueError, match=f"values is {wrong}; allowed: torch.float"):
            optimizer.step(elements={p: (torch.tensor([1]), torch.ones(1, dtype=wrong))})


# ---- sketches as value types ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CountSketch, CountMinSketch])
def test_a_sketch_of_float64_is_one_of_float32_but_for_its_rounding(kind):
    rows = torch.tensor([3, 11, 3, 0, 19])
    values = torch.rand(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (F64, torch.float32):
        sketch = kind(20, 3, width=4, dtype=dtype)
        sketch.insert(rows, values.to(dtype))
        estimates = sketch.update(rows[1:], values[1:].to(dtype), gain=0.3, decay=0.1)
        other = kind(20, 3, width=4, dtype=dtype)
        other.load_state_dict(sketch.state_dict())
        other.merge(sketch)
        assert estimates.dtype == other.values.dtype == dtype
        assert sketch.num_bytes == 3 * 4 * 3 * dtype.itemsize + 8 * 3
        found[dtype] = (estimates, sketch.values, other.query(rows))
    for mine, theirs in zip(*found.values(), strict=True):
        assert_close(mine.float(), theirs)
        assert (mine.float().double() != mine).any()


def test_sketches_of_two_dtypes_do_not_mix():
    single, double = CountSketch(20, 3), CountSketch(20, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"is torch.float64; allowed: torch.float32, as this one"):
        single.merge(double)
    with pytest.raises(ValueError, match=r"values is torch.float32; allowed: torch.float64"):
        double.insert(torch.tensor([1]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="dtype is torch.float16; allowed: torch.float32, torch"):
        CountSketch(20, 3, dtype=torch.float16)
    single.load_state_dict(double.state_dict())
    assert single.values.dtype == torch.float32
