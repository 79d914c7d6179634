"""Preconditioning, selection and residuals together: the method, against its definition."""

import math

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local
from dgc.optimizer.hooks.handed_over import HandedOver
from dgc.worker.statistics import Statistics
from optim import Adam, FactoredAdam, SketchMomentum
from parsimony_kernels.buffers import ops as buffers
from tests.tolerances import assert_close
from tests.unit.dgc.method import (
    CHOICES,
    NO_FIRST,
    OPTIMIZERS,
    assert_equal,
    combinations,
    run_jobs,
)

DEFAULTS = {key: values[0] for key, values in CHOICES.items()}
N, M = 30, 40


def label(combination):
    name, choice = combination
    unusual = [f"{k}={v}" for k, v in choice.items() if v != DEFAULTS[k]]
    return "-".join([name.replace(", ", "+"), *unusual]).replace(" ", "_")


@pytest.mark.one_in(5)
@pytest.mark.parametrize("combination", list(combinations()), ids=label)
def test_replicas_stay_equal_to_the_bit_in_every_combination(combination):
    def work(job):
        for _ in range(4):
            job.step()
        state = job.state()
        return state["parameters"], state["optimizer"]

    first, *others = run_jobs(4, *combination, work)
    for parameter in first[0].values():
        assert torch.isfinite(parameter).all()
    for other in others:
        assert_equal(first, other)


def one_tensor(optimizer_of, compression, grads_of, num_steps, world_size=1, **settings):
    """Give one (N, M) weight, from 0, each worker's gradients; return what the work left."""

    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        optimizer = DistributedOptimizer(
            optimizer_of([weight]), [("w", weight)], comm=comm, compression=compression, **settings
        )
        for step in range(num_steps):
            weight.backward(grads_of(comm.rank, step))
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach(), optimizer

    return run_local(world_size, work)


def random_grads(rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(N, M, generator=generator) * torch.rand(N, 1, generator=generator)


def test_late_factored_is_the_designs_listing():
    """Three workers, ten steps, against loops over the definition in float64."""
    beta2, lr, eps, density, workers = 0.9, 0.1, 1e-8, 0.01, 3
    compression = Compression(density=density, min_numel=1)
    results = one_tensor(
        lambda p: FactoredAdam(p, lr=lr, betas=(0.0, beta2), eps=eps, min_compressed_numel=0),
        compression, random_grads, 10, workers,
    )  # fmt: skip
    weight = torch.zeros(N, M, dtype=torch.float64)
    state = [[torch.zeros(N, M).double(), torch.zeros(N).double(), torch.zeros(M).double()]
             for _ in range(workers)]  # fmt: skip
    for t in range(1, 11):
        total = torch.zeros_like(weight)
        for rank, (v, r, c) in enumerate(state):
            g = random_grads(rank, t - 1).double()
            v += g
            r.mul_(beta2).add_((1 - beta2) * g.square().mean(1))
            c.mul_(beta2).add_((1 - beta2) * g.square().mean(0))
            root = (r[:, None] * c / (r.mean() * (1 - beta2**t))).sqrt() + eps
            chosen = v.abs().view(-1).topk(math.ceil(density * N * M)).indices
            total.view(-1)[chosen] += (v / root).view(-1)[chosen]
            v.view(-1)[chosen] = 0
        weight -= lr * total / workers
    for mine, _ in results:
        assert_close(mine, weight.float())
    for (_, optimizer), (v, _, _) in zip(results, state, strict=True):
        assert_close(optimizer.compensation.residual["w"].view(N, M), v.float())


def test_density_one_late_is_adam_itself_with_one_worker():
    (late,) = one_tensor(
        lambda p: Adam(p, lr=0.1, betas=NO_FIRST),
        Compression(density=1.0, min_numel=1), random_grads, 8,
    )  # fmt: skip
    weight = nn.Parameter(torch.zeros(N, M))
    own = Adam([weight], lr=0.1, betas=NO_FIRST)
    for step in range(8):
        weight.grad = random_grads(0, step)
        own.step()
    assert_close(late[0], weight.detach())


@pytest.mark.parametrize("name", ["factored", "cover", "sketch", "full"])
def test_sharing_makes_the_statistics_of_all_workers_the_mean(name):
    shared = Compression(density=0.01, min_numel=1, share_statistics=math.inf)
    alone = Compression(density=0.01, min_numel=1)
    states = [
        [o.worker_state_dict()["statistics"]["w"] for _, o in
         one_tensor(OPTIMIZERS[name], how, random_grads, 1, world_size=3)]
        for how in (shared, alone)
    ]  # fmt: skip
    for part, tensor in states[0][0].items():
        assert all(torch.equal(tensor, other[part]) for other in states[0])
        mean = torch.stack([other[part].double() for other in states[1]]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-9)


def test_one_worker_shares_with_itself():
    settings = {"density": 0.01, "min_numel": 1}
    one, other = (
        one_tensor(OPTIMIZERS["factored"], how, random_grads, 10)[0][0]
        for how in (Compression(**settings), Compression(**settings, share_statistics=math.inf))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(("ratio", "every"), [(math.inf, 1), (1.0, 3), (0.3, 10), (0.0, 10**9)])
def test_statistics_are_shared_as_often_as_their_bytes_allow(ratio, every):
    """30 + 40 floats are 280 bytes; 12 entries of 8 bytes are 96."""
    compression = Compression(density=0.01, min_numel=1, share_statistics=ratio)

    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        optimizer = DistributedOptimizer(
            OPTIMIZERS["factored"]([weight]), [("w", weight)], comm=comm, compression=compression
        )
        rows, sent = [], []
        for step in range(21):
            weight.backward(random_grads(comm.rank, step))
            optimizer.step()
            optimizer.zero_grad()
            rows.append(optimizer.worker_state_dict()["statistics"]["w"]["exp_avg_sq_row"].clone())
            sent.append(optimizer.stats.statistics_bytes)
        return rows, sent

    (first, sent), (second, _) = run_local(2, work)
    is_due = [ratio > 0 and step % every == 0 for step in range(21)]
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == is_due
    assert sent == [4 * (N + M) if due else 0 for due in is_due]


def test_statistics_of_several_tensors_are_shared_in_turns():
    statistics = Statistics({}, {"a": 3, "b": 3, "c": 3})
    assert [statistics.due(step) for step in range(4)] == [["a"], ["c"], ["b"], ["a"]]


def test_selection_by_preconditioned_magnitude_picks_other_entries():
    """Rows of tiny gradients are sent by it, and not by raw magnitude."""
    rows = torch.logspace(-4, 0, N)[:, None]

    def grads(rank, step):
        return torch.randn(N, M, generator=torch.Generator().manual_seed(step)) * rows

    sent = {}
    for by in ("raw", "preconditioned"):
        compression = Compression(density=0.02, min_numel=1, select_by=by)
        ((weight, _),) = one_tensor(OPTIMIZERS["full"], compression, grads, 3)
        sent[by] = (weight != 0).any(1)
    assert not sent["raw"][: N // 2].any()
    assert sent["preconditioned"][: N // 2].any()


def test_early_preconditions_what_is_accumulated():
    compression = Compression(density=0.01, min_numel=1, preconditioning="early")
    ((_, optimizer),) = one_tensor(OPTIMIZERS["full"], compression, random_grads, 1)
    left = optimizer.compensation.residual["w"]
    grad = random_grads(0, 0).view(-1)[left != 0]
    assert_close(left[left != 0], grad / (grad.abs() + 1e-8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sent_and_left_are_what_was_added(dtype):
    """Exactly in float32, whose sums of small integers are exact; else in the mean over seeds."""

    def grads(rank, step):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randint(-50, 51, (N, M), generator=generator).float()
        return grad if dtype == "float32" else grad * 1.01  # so that bfloat16 must round

    added = sum(grads(0, step) for step in range(6))
    errors = []
    for seed in range(1 if dtype == "float32" else 400):
        compression = Compression(density=0.01, min_numel=1, residual_dtype=dtype)
        ((weight, optimizer),) = one_tensor(
            lambda p: torch.optim.SGD(p, lr=1.0), compression, grads, 6, seed=seed
        )
        left = buffers.decode(optimizer.compensation.residual["w"]).view(N, M)
        errors.append(left - weight - added)
    if dtype == "float32":
        assert (errors[0] == 0).all()
        return
    # Six roundings of at most half a step each in the mean of squares, of values below 300.
    step = 300 / 127 if dtype == "int8" else 2.0
    error = torch.stack(errors)
    assert error.std(0).max() > 0
    bound = 5 * step * math.sqrt(6) / 2 / math.sqrt(len(errors))
    assert error.mean(0).abs().max() < bound


def test_micro_batches_lose_nothing_where_entries_are_taken_out_in_passing():
    """Entries reach a threshold in each pass, but only the last pass may take them out."""

    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0), [("w", weight)], comm=comm,
            compression=Compression(density=0.01, min_numel=1, exact_below=0),
            micro_batches_per_step=2,
        )  # fmt: skip
        added = torch.zeros(N, M)
        for step in range(6):
            for part in range(2):
                grad = random_grads(part, step).mul(100).round()  # sums of which are exact
                added += grad
                weight.backward(grad)
            optimizer.step()
            optimizer.zero_grad()
        left = optimizer.compensation.residual["w"].view(N, M)
        assert_equal(left - weight.detach(), added)

    run_local(1, work)


def test_what_float16_loses_stays_in_the_residuals_units():
    compression = Compression(density=0.01, min_numel=1, value_dtype="float16")
    ((weight, optimizer),) = one_tensor(OPTIMIZERS["full"], compression, random_grads, 1)
    sent = weight / -0.01
    root = optimizer._exchange.kept.statistics.root("w").view(N, M)
    left = optimizer.compensation.residual["w"].view(N, M)
    chosen = weight != 0
    assert_close((sent * root + left)[chosen], random_grads(0, 0)[chosen])
    assert (left[chosen].abs() < random_grads(0, 0)[chosen].abs() * 2**-10).all()


def test_micro_batches_add_their_gradients_and_average_their_squares():
    """Four micro-batches a step: the sum is sent, divided by the root of the mean of squares."""

    def four_parts(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        optimizer = DistributedOptimizer(
            Adam([weight], lr=0.1, betas=(0.0, 0.9)), [("w", weight)], comm=comm,
            compression=Compression(density=1.0, min_numel=1), micro_batches_per_step=4,
        )  # fmt: skip
        for step in range(5):
            for part in range(4):
                weight.backward(random_grads(part, step) / 4)
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    weight, nu = torch.zeros(N, M).double(), torch.zeros(N, M).double()
    for step in range(5):
        grads = torch.stack([random_grads(part, step).double() for part in range(4)])
        nu = 0.9 * nu + 0.1 * grads.square().mean(0)
        weight -= 0.1 * grads.mean(0) / ((nu / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    assert_close(run_local(1, four_parts)[0], weight.float())


def test_a_gradients_memory_is_given_up_at_each_micro_batch():
    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        optimizer = DistributedOptimizer(
            OPTIMIZERS["factored"]([weight]), [("w", weight)], comm=comm,
            compression=Compression(density=0.01, min_numel=1), micro_batches_per_step=2,
        )  # fmt: skip
        weight.backward(torch.ones(N, M))
        return type(weight.grad), optimizer.micro_batches_per_step

    assert run_local(1, work) == [(HandedOver, 2)]


@pytest.mark.parametrize("name", ["factored", "sgd"])
def test_weight_decay_reaches_what_does_not_arrive(name):
    def decayed(params):
        if name == "sgd":
            return torch.optim.SGD(params, lr=0.1, weight_decay=0.5)
        return FactoredAdam(
            params, lr=0.1, betas=NO_FIRST, weight_decay=0.5, decoupled_weight_decay=True
        )

    def work(comm):
        weight = nn.Parameter(torch.ones(N, M))
        optimizer = DistributedOptimizer(
            decayed([weight]), [("w", weight)], comm=comm,
            compression=Compression(density=0.01, min_numel=1),
        )  # fmt: skip
        for _ in range(3):
            (weight.view(-1)[5] * 0.0).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach()

    assert_close(run_local(1, work)[0], torch.full((N, M), 0.95**3))


@pytest.mark.parametrize(
    ("make", "settings", "complaint"),
    [
        (OPTIMIZERS["factored, first moment"], {"momentum": 0.9}, "averaged twice"),
        (OPTIMIZERS["torch adam"], {"momentum": 0.9}, "averaged twice"),
        (lambda p: SketchMomentum(p, momentum=0.9), {"momentum": 0.9}, "averaged twice"),
        (OPTIMIZERS["torch adam"], {"preconditioning": "late"}, "AdamW has no second moment"),
        (OPTIMIZERS["sgd"], {"preconditioning": "early"}, "SGD has no second moment"),
        (OPTIMIZERS["sgd"], {"share_statistics": 1.0}, "share_statistics is 1.0"),
        (OPTIMIZERS["factored"],
         {"preconditioning": "after", "select_by": "preconditioned"}, "select_by is"),
        (lambda p: FactoredAdam(p, weight_decay=0.1), {}, "decoupled_weight_decay=True"),
        (OPTIMIZERS["torch adam"], {"update_scale": 2.0}, "divides it out again"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_reason(make, settings, complaint):
    def work(comm):
        weight = nn.Parameter(torch.zeros(N, M))
        DistributedOptimizer(
            make([weight]), [("w", weight)], comm=comm, compression=Compression(**settings)
        )

    with pytest.raises(ValueError, match=complaint):
        run_local(2, work)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2.1), ("int8", 1.15)])
def test_kept_bytes_a_parameter(dtype, most):
    """Everything that lives after a step beside the parameters, of 2.1 million of them."""

    def work(comm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(4000, 256), nn.Linear(256, 4000), nn.LSTM(4, 60))
        inner = FactoredAdam(model.parameters(), betas=NO_FIRST)
        optimizer = DistributedOptimizer(
            inner, model.named_parameters(), comm=comm,
            compression=Compression(density=0.001, residual_dtype=dtype),
        )  # fmt: skip
        for _ in range(2):
            words = torch.randint(4000, (20,))
            model[1](model[0](words)).square().mean().backward()
            model[2](torch.randn(3, 4))[0].mean().backward()
            optimizer.step()
        kept = [p.grad for p in model.parameters() if p.grad is not None]
        kept += [t for state in inner.state.values() for t in state.values()]
        count = sum(p.numel() for p in model.parameters())
        total = sum(t.nbytes for t in kept) + sum(optimizer.worker_state_bytes().values())
        return count, total / count

    count, each = run_local(1, work)[0]
    assert count > 2_000_000
    assert each <= most


@pytest.mark.parametrize("autocast", [torch.bfloat16])
def test_autocast_gradients_are_taken_as_they_come(autocast):
    def work(comm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 5))
        optimizer = DistributedOptimizer(
            OPTIMIZERS["factored"](model.parameters()), model.named_parameters(), comm=comm,
            compression=Compression(density=0.02, min_numel=100, residual_dtype="int8"),
        )  # fmt: skip
        losses = []
        for step in range(80):
            generator = torch.Generator().manual_seed(2 * step + comm.rank)
            inputs = torch.randn(32, 40, generator=generator)
            with torch.autocast("cpu", dtype=autocast):
                loss = nn.functional.cross_entropy(model(inputs), inputs[:, :5].argmax(1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, nn.utils.parameters_to_vector(model.parameters())

    (losses, one), (_, other) = run_local(2, work)
    assert torch.equal(one, other)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("name", ["factored", "sgd"])
def test_update_scale_multiplies_the_rate_of_compressible_tensors_alone(name, density):
    """Here of the weight, by 4; the bias, which is sent whole, moves as it did."""

    def work(comm, scale):
        named = {"bias": nn.Parameter(torch.zeros(M)), "weight": nn.Parameter(torch.zeros(N, M))}
        optimizer = DistributedOptimizer(
            OPTIMIZERS[name](named.values()), named.items(), comm=comm,
            compression=Compression(density=density, min_numel=100, update_scale=scale),
        )  # fmt: skip
        for step in range(3):
            named["bias"].backward(random_grads(comm.rank, step)[0])
            named["weight"].backward(random_grads(comm.rank, step))
            optimizer.step()
            optimizer.zero_grad()
        return named["bias"].detach(), named["weight"].detach()

    (bias, weight), (same_bias, scaled) = (
        run_local(2, lambda comm, s=scale: work(comm, s))[0] for scale in (1.0, 4.0)
    )
    assert torch.equal(bias, same_bias)
    assert_close(scaled, 4 * weight)
