"""What every optimizer does alike: gradients of each kind, options, parameters of each kind."""

from itertools import product

import pytest
import torch

from optim import SM3, Adam, SketchAdagrad, SketchAdam, SketchMomentum
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

SHAPES = [(12, 5), (6, 2, 9)]  # the second is squarest as 12 x 9, while its rows are 6
every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)
# A cover's estimate for a sparse gradient is another than for a whole tensor (test_sm3_drop_in.py),
# and where elements arrive its accumulators can only rise: only SM3-II's sums cannot tell.
WITHOUT_COVERS = [name for name in EVERY_OPTIMIZER if not name.startswith("SM3")]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def warmed_up(name, shape, dtype=torch.float32):
    """A parameter after three dense steps, and its optimizer."""
    p = parameter(*shape, dtype=dtype)
    optimizer = EVERY_OPTIMIZER[name]([p])
    for grad in gradients(3, *shape, dtype=dtype):
        step(optimizer, p, grad)
    p.grad = None
    return optimizer, p


def all_elements(grad):
    return torch.arange(grad.numel()), grad.reshape(-1)


# ---- kinds of gradient -------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("name", WITHOUT_COVERS)
def test_row_sparse_with_every_row_is_dense(name, shape):
    (dense, p), (sparse, q) = warmed_up(name, shape), warmed_up(name, shape)
    for grad in gradients(4, *shape, seed=5):
        step(dense, p, grad)
        step(sparse, q, row_sparse(torch.arange(shape[0]), grad, shape))
    if "actored" in name:  # the columns' mean is summed in another order
        assert_close(q.detach(), p.detach())
    else:
        assert torch.equal(q, p)
        assert_same_state(copy_of_state(sparse), copy_of_state(dense))


@every_shape
@pytest.mark.parametrize(
    ("name", "as_coo"), [*product(WITHOUT_COVERS, [False, True]), ("SM3", False)]
)
def test_element_sparse_with_every_element_is_dense(name, shape, as_coo):
    (dense, p), (sparse, q) = warmed_up(name, shape), warmed_up(name, shape)
    for grad in gradients(4, *shape, seed=5):
        step(dense, p, grad)
        if as_coo:
            step(sparse, q, grad.to_sparse())
        else:
            sparse.step(elements={q: all_elements(grad)})
    if "actored" in name:
        assert_close(q.detach(), p.detach())
    else:
        assert torch.equal(q, p)
        assert_same_state(copy_of_state(sparse), copy_of_state(dense))


@every_shape
@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_only_what_arrived_is_touched(name, shape, dtype, kind):
    optimizer, p = warmed_up(name, shape, dtype)
    p.data *= 1e-5  # so that no change is lost in 16 bits
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    arrived = torch.zeros(shape, dtype=torch.bool)
    if kind == "rows":
        arrived[[1, 4]] = True
        step(optimizer, p, row_sparse([1, 4], torch.ones(2, *shape[1:], dtype=dtype), shape))
    else:
        indices = torch.tensor([0, 7, 8, arrived.numel() - 1])
        arrived.view(-1)[indices] = True
        optimizer.step(elements={p: (indices, torch.ones(4))})
    assert torch.equal(p[~arrived], before[~arrived])
    assert (p[arrived] != before[arrived]).all()
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        full = optimizer.state[p].get(key)
        if full is not None and full.shape == shape:
            assert torch.equal(full[~arrived], state[key][~arrived])


@every_optimizer
def test_duplicates_in_a_sparse_gradient_are_summed_first(name):
    (optimizer, p), (other, q) = warmed_up(name, (6, 3)), warmed_up(name, (6, 3))
    values = torch.tensor([[1.0, 2, 3], [4, 5, 6], [-3, 0, 1]])
    step(optimizer, p, row_sparse([4, 1, 4], values, (6, 3)))
    step(other, q, row_sparse([1, 4], torch.stack([values[1], values[0] + values[2]]), (6, 3)))
    assert torch.equal(p, q)


@every_optimizer
@pytest.mark.parametrize("kind", ["dense", "rows", "elements"])
def test_every_run_gives_the_same_bits(name, kind):
    def run():
        optimizer, p = warmed_up(name, (33, 7))
        for grad in gradients(3, 33, 7, seed=5):
            if kind == "rows":
                grad = row_sparse(torch.arange(0, 33, 2), grad[::2], grad.shape)
            elif kind == "elements":
                grad = (grad * (grad > 0)).to_sparse()
            step(optimizer, p, grad)
        return p.detach()

    assert torch.equal(run(), run())


def test_what_does_not_arrive_counts_no_step():
    p, q = parameter(3, 4), parameter(3, 4)
    optimizer = SketchAdam([p, q], min_compressed_numel=0)
    before = copy_of_state(optimizer)[1]
    step(optimizer, p, torch.ones(3, 4))
    assert optimizer.state[p]["step"] == 1
    assert_same_state([optimizer.state[q]], [before])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
@every_optimizer
def test_empty_parameters_and_gradients_are_let_through(name, shape):
    p = parameter(*shape)
    optimizer = EVERY_OPTIMIZER[name]([p])
    step(optimizer, p, torch.zeros(shape))
    optimizer2, q = warmed_up(name, (4, 3))
    before = q.detach().clone()
    step(optimizer2, q, row_sparse(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3), (4, 3)))
    assert torch.equal(q, before)


# ---- weight decay, rates, closures -------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_reaches_only_rows_that_arrived(decoupled):
    p, q = parameter(4, 3), parameter(4, 3)
    options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    optimizer, dense = Adam([p], 0.1, **options), Adam([q], 0.1, **options)
    before = p.detach().clone()
    grad = torch.zeros(4, 3)
    grad[2] = 1
    step(optimizer, p, row_sparse([2], grad[2:3], (4, 3)))
    step(dense, q, grad)
    assert torch.equal(p[[0, 1, 3]], before[[0, 1, 3]])
    assert torch.equal(p[2], q[2]) and not torch.equal(q[0], before[0])


def test_groups_have_options_of_their_own():
    p, q = parameter(8, 3), parameter(8, 3)
    groups = [{"params": [p], "second_moment": "factored"}, {"params": [q], "lr": 0.0}]
    optimizer = Adam(groups, 0.1, min_compressed_numel=0)
    assert "exp_avg_sq_row" in optimizer.state[p] and "exp_avg_sq" in optimizer.state[q]
    before = q.detach().clone()
    p.grad = q.grad = torch.ones(8, 3)
    optimizer.step()
    assert torch.equal(q, before)


def test_schedulers_of_torch_move_the_rate():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = SM3([p], lr=torch.tensor(1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (-1.0, -1.5, -1.75):
        optimizer.state[p]["accumulator_0"].zero_()
        step(optimizer, p, torch.ones(3))
        schedule.step()
        assert p.tolist() == [expected] * 3


def test_a_closure_is_run_once_with_gradients_enabled():
    p = parameter(3)
    optimizer, losses = SM3([p]), []

    def closure():
        optimizer.zero_grad()
        losses.append(p.square().sum())
        losses[-1].backward()
        return losses[-1]

    before = p.detach().clone()
    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1 and not torch.equal(p, before)


# ---- which state -------------------------------------------------------------------------------


def test_small_tensors_and_vectors_keep_full_state():
    small, large, vector = parameter(9, 11), parameter(10, 10), parameter(1000)
    optimizer = SketchAdam([small, large, vector], min_compressed_numel=100)
    shapes = [tuple(state["exp_avg_sq"].shape) for state in optimizer.state.values()]
    assert shapes == [(9, 11), (3, 1, 10), (1000,)]


@every_optimizer
def test_bytes_are_those_of_the_tensors(name):
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Conv2d(2, 3, 3))
    optimizer = EVERY_OPTIMIZER[name](model.named_parameters())
    found = optimizer.state_bytes()
    assert list(found) == [name for name, _ in model.named_parameters()]
    storages = [t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values()]
    assert optimizer.num_bytes == sum(found.values()) == sum(storages)


def test_structures_are_as_small_as_they_say():
    p, step_bytes = parameter(300, 100), 4
    sizes = {
        name: EVERY_OPTIMIZER[name]([p]).num_bytes - step_bytes
        for name in ("SketchAdam, beta1 = 0", "FactoredAdam", "SM3", "Adam")
    }
    assert sizes == {
        "SketchAdam, beta1 = 0": 4 * 3 * 20 * 100 + 8 * 3,
        "FactoredAdam": 4 * (300 * 100 + 300 + 100),
        "SM3": 4 * (300 + 100),
        "Adam": 4 * 2 * 300 * 100,
    }


def test_every_sketch_has_hashes_of_its_own_that_ranks_agree_on():
    def seeds(seed):
        optimizer = SketchAdam(
            [parameter(9, 4), parameter(9, 4)], min_compressed_numel=0, seed=seed
        )
        names = ("exp_avg_seeds", "exp_avg_sq_seeds")
        return [tuple(s[n].tolist()) for s in optimizer.state.values() for n in names]

    assert len({number for each in seeds(0) + seeds(1) for number in each}) == 24
    torch.manual_seed(torch.initial_seed() + 1)
    assert seeds(0) == seeds(0)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_is_float32_whatever_the_parameter_is(name, dtype):
    optimizer, p = warmed_up(name, (6, 5), dtype)
    dtypes = {k: v.dtype for k, v in optimizer.state[p].items() if not k.endswith("_seeds")}
    assert set(dtypes.values()) == {torch.float32}
    assert p.dtype == dtype and p.isfinite().all()


# ---- which parameters --------------------------------------------------------------------------


@every_optimizer
def test_parameters_need_not_be_contiguous(name):
    first = torch.nn.Parameter(parameter(4, 3, 2, 2).detach().to(memory_format=torch.channels_last))
    second, other = torch.nn.Parameter(parameter(5, 7).detach().T), parameter(4, 3, 2, 2)
    third = torch.nn.Parameter(second.detach().contiguous())
    assert not first.is_contiguous() and not second.is_contiguous()
    strided = EVERY_OPTIMIZER[name]([first, second])
    plain = EVERY_OPTIMIZER[name]([other, third])
    grads = zip(gradients(3, 4, 3, 2, 2), gradients(3, 7, 5), strict=True)
    for grad, matrix in grads:
        first.grad = grad.to(memory_format=torch.channels_last)
        second.grad, third.grad = matrix.T.contiguous().T, matrix
        strided.step()
        step(plain, other, grad)
    assert torch.equal(first, other) and torch.equal(second, third)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_capture_in_a_cuda_graph_is_refused_and_changes_nothing(monkeypatch):
    """A replay would repeat the rate and the bias correction of the step that was captured."""
    optimizer, p = warmed_up("FactoredAdam", (4, 3))
    before, state = p.detach().clone(), copy_of_state(optimizer)
    p.grad = torch.ones(4, 3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="repeat this step's rate .*call step.. outside of the"):
        optimizer.step()
    assert torch.equal(p, before)
    assert_same_state(copy_of_state(optimizer), state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert optimizer.state[p]["step"] == 4


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_that_groups_share_as_a_tensor_is_read_and_never_written(name, dtype):
    (optimizer, p), lr = warmed_up(name, (4, 3)), torch.tensor(0.05, dtype=dtype)
    other, q = warmed_up(name, (4, 3))
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    for each, rate in ((optimizer, lr), (other, lr.item())):
        each.param_groups[0].update(decay, lr=rate)
        each.add_param_group({"params": [parameter(5), parameter(2, 3)], "lr": rate, **decay})
    saved = optimizer.state_dict()
    for each in (optimizer, other):
        for group in each.param_groups:
            for x in group["params"]:
                x.grad = torch.ones_like(x)
        each.step()
        each.load_state_dict(each.state_dict())
        each.step()
    assert lr.item() == torch.tensor(0.05, dtype=dtype).item()
    assert all(group["lr"] is lr for group in saved["param_groups"])
    assert torch.equal(p, q)


def test_autograd_notices_that_a_step_changed_what_it_saved():
    p = parameter(3, 4)
    loss, optimizer = (p * p).sum(), SM3([p])
    step(optimizer, p, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_parameters_get_state_when_they_are_thawed():
    p = parameter(3, 4).requires_grad_(False)
    optimizer = SM3([p])
    assert optimizer.num_bytes == 0
    step(optimizer, p.requires_grad_(), torch.ones(3, 4))
    assert set(optimizer.state[p]) == {"step", "accumulator_0", "accumulator_1"}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"{dtype}; allowed: dense and torch.float32, torch.bf"):
        SM3([torch.nn.Parameter(torch.zeros(3, dtype=dtype))])
    frozen = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert SM3([frozen]).num_bytes == 0


# ---- what is refused ---------------------------------------------------------------------------


def bad_gradients(p):
    three = torch.ones(2, 3, 4).to_sparse(2)
    yield {"grad": three}, r"2 sparse dimensions; allowed: 1 \(rows\) or 3 \(elements\)"
    positions = torch.tensor([0, 5])
    yield {"elements": {p: (positions, torch.ones(3))}}, "2 entries for 3 values"
    yield {"elements": {p: (positions.flip(0), torch.ones(2))}}, "not ascending and unique"
    yield {"elements": {p: (positions + 19, torch.ones(2))}}, "lie in 19..24; allowed: 0..23"
    yield {"elements": {p: (positions, torch.ones(2).half())}}, "values is torch.float16; allowed"
    yield {"elements": {parameter(2): (positions, torch.ones(2))}}, "no parameters of this optim"
    both = {"grad": torch.ones(2, 3, 4), "elements": {p: (positions, torch.ones(2))}}
    yield both, "has elements and a .grad; allowed: one of them"


@pytest.mark.parametrize("case", range(7))
def test_gradients_that_cannot_be_are_refused_and_change_nothing(case):
    p = parameter(2, 3, 4)
    optimizer = SketchAdagrad([p], min_compressed_numel=0)
    before, state = p.detach().clone(), copy_of_state(optimizer)
    given, message = list(bad_gradients(p))[case]
    p.grad = given.get("grad")
    with pytest.raises(ValueError, match=message):
        optimizer.step(elements=given.get("elements"))
    assert torch.equal(p, before)
    assert_same_state(copy_of_state(optimizer), state)


def test_a_gradient_of_another_shape_is_refused():
    p = parameter(2, 3)
    optimizer = SM3([p])
    p.grad = torch.ones(2, 3)
    p.data = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"grad is \(2, 3\) .*; allowed: \(3, 3\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SM3, {"lr": -1}, "lr is -1; allowed: 0 or more"),
        (SM3, {"lr": "fast"}, "lr is 'fast'; allowed: 0 or more"),
        (SM3, {"momentum": 1.0}, "momentum is 1.0; allowed: from 0 to below 1"),
        (SM3, {"beta": -0.1}, "beta is -0.1; allowed: from 0 to below 1"),
        (SM3, {"variant": "III"}, "variant is 'III'; allowed: I, II"),
        (SM3, {"eps": float("nan")}, "eps is nan; allowed: 0 or more"),
        (SketchAdam, {"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); allowed: two, from 0 to"),
        (SketchAdam, {"betas": ("a", 0.9)}, r"betas is \('a', 0.9\); allowed: two, from 0 to"),
        (SketchAdam, {"betas": 0.9}, "betas is 0.9; allowed: two, from 0 to"),
        (SketchAdam, {"depth": 6}, "depth is 6; allowed: an integer, 1 to 5"),
        (SketchAdam, {"clean_interval": 0}, "clean_interval is 0; allowed: a number of steps"),
        (SketchAdam, {"min_compressed_numel": -1}, "min_compressed_numel is -1; allowed"),
        (SketchAdam, {"first_moment": "cover"}, "first_moment is 'cover'; allowed: full, sketch"),
        (Adam, {"second_moment": "small"}, "second_moment is 'small'; allowed: full, cover, f"),
        (Adam, {"decoupled_weight_decay": 2}, "decoupled_weight_decay is 2; allowed: True or"),
        (SketchMomentum, {"weight_decay": -1}, "weight_decay is -1; allowed: 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make([parameter(2, 3)], **options)


def test_a_group_that_is_refused_is_not_added():
    p, q = parameter(2, 3), parameter(2, 3)
    optimizer = SM3([p])
    with pytest.raises(ValueError, match="momentum is 2"):
        optimizer.add_param_group({"params": [q], "momentum": 2})
    assert len(optimizer.param_groups) == 1 and list(optimizer.state) == [p]


@every_optimizer
@pytest.mark.parametrize("kind", ["dense", "rows", "elements"])
def test_implementations_agree(name, kind):
    """The kernels' own tests are closer; this one holds that optimizers use them alike."""

    def run():
        optimizer, p = warmed_up(name, (33, 2, 4))
        for grad in gradients(2, 33, 2, 4, seed=5):
            if kind == "rows":
                grad = row_sparse(torch.arange(0, 33, 2), grad[::2], grad.shape)
            elif kind == "elements":
                grad = (grad * (grad > 0)).to_sparse()
            step(optimizer, p, grad)
        return p.detach()

    native = run()
    with ops.use("reference"):
        assert_close(native, run())


def test_bad_elements_are_found_before_anything_moves():
    p, q = parameter(3, 2), parameter(3, 2)
    optimizer = SM3([p, q])
    before = p.detach().clone()
    good = (torch.tensor([0, 1]), torch.ones(2))
    for bad in ((torch.tensor([1, 0]), torch.ones(2)), (torch.tensor([0]), torch.ones(1).half())):
        with pytest.raises(ValueError, match="allowed|ascending"):
            optimizer.step(elements={p: good, q: bad})
        assert torch.equal(p, before)
