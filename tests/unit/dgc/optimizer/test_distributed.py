import copy
import functools
import math

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer, row_sparse_names
from dgc.comm.local import run_local
from dgc.optimizer.hooks.handed_over import HandedOver
from optim import FactoredAdam
from tests.unit.dgc.method import Recording

FEATURES, CLASSES, BATCH = 20, 5, 8


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 100), nn.Tanh(), nn.Linear(100, CLASSES))


def batches(num_steps, num_parts):
    """num_steps batches of num_parts * BATCH samples."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        inputs = torch.randn(num_parts * BATCH, FEATURES, generator=generator)
        yield inputs, inputs[:, :CLASSES].argmax(1)


def backward(model, inputs, labels, scale=1.0):
    (nn.functional.cross_entropy(model(inputs), labels) * scale).backward()


def train(world_size, make_optimizer, compression=None, num_steps=12, micro_batches=1, **settings):
    """Train on the same joined batches whatever the number of workers; return each one's model."""
    initial = make_model()

    def work(comm):
        model = copy.deepcopy(initial)
        optimizer = DistributedOptimizer(
            make_optimizer(model.parameters()),
            model.named_parameters(),
            comm=comm,
            compression=compression,
            micro_batches_per_step=micro_batches,
            **settings,
        )
        for inputs, labels in batches(num_steps, world_size * micro_batches):
            parts = zip(inputs.split(BATCH), labels.split(BATCH), strict=True)
            for part in list(parts)[comm.rank :: world_size]:
                backward(model, *part, 1 / micro_batches)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    return run_local(world_size, work)


def train_alone(make_optimizer, num_parts, num_steps=12):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    for inputs, labels in batches(num_steps, num_parts):
        optimizer.zero_grad()
        backward(model, inputs, labels)
        optimizer.step()
    return model


def parameters(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def sparse_adam(parameters):
    return torch.optim.SparseAdam(list(parameters), lr=0.05)


def momentum_sgd(parameters, nesterov=False, **settings):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=nesterov, **settings)


@pytest.mark.parametrize("make", [momentum_sgd, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_dense_workers_equal_one_worker_on_the_joined_batch(make, world_size):
    alone = parameters(train_alone(make, world_size))
    results = [parameters(model) for model, _ in train(world_size, make, bucket_bytes=1)]
    for result in results:
        torch.testing.assert_close(result, alone, atol=2e-5, rtol=1e-4)
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask_velocity", [False, True])
def test_density_one_is_momentum_sgd_with_or_without_masking(nesterov, mask_velocity):
    def make(params):
        return momentum_sgd(params, nesterov)

    compression = Compression(density=1.0, mask_velocity=mask_velocity)
    alone = parameters(train_alone(make, 2))
    for model, optimizer in train(2, make, compression):
        torch.testing.assert_close(parameters(model), alone, atol=2e-5, rtol=1e-4)
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
        assert not optimizer.inner.state  # no second buffer: the momentum is the velocity


def test_micro_batches_equal_one_batch_of_their_size():
    alone = parameters(train_alone(momentum_sgd, 6))
    for model, _ in train(2, momentum_sgd, micro_batches=3):
        torch.testing.assert_close(parameters(model), alone, atol=2e-5, rtol=1e-4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("make", [momentum_sgd, torch.optim.Adam])
@pytest.mark.parametrize("value_dtype", ["float32", "float16"])
@pytest.mark.parametrize("bucket_bytes", [1, 10**9])
def test_sparse_replicas_stay_equal_to_the_bit_and_learn(make, value_dtype, bucket_bytes):
    compression = Compression(density=0.02, min_numel=100, value_dtype=value_dtype)
    results = train(3, make, compression, num_steps=150, bucket_bytes=bucket_bytes)
    vectors = [parameters(model) for model, _ in results]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)
    assert results[0][1].stats.sparse_bytes > 0
    inputs, labels = next(batches(1, 40))
    accuracy = (results[0][0](inputs).argmax(1) == labels).float().mean()
    assert accuracy > 0.6  # guessing: 0.2


def test_weight_decay_pulls_as_hard_as_through_the_momentum():
    """Without a gradient, decay alone shrinks weights as fast as momentum SGD would in the end."""
    rates = []
    for correction in (False, True):

        def work(comm, correction=correction):
            weight = nn.Parameter(torch.ones(40, 50))
            optimizer = DistributedOptimizer(
                momentum_sgd([weight], weight_decay=0.001),
                [("w", weight)],
                comm=comm,
                compression=Compression(density=0.01, momentum_correction=correction),
            )
            means = []
            for _ in range(300):
                (weight * 0).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                means.append(weight.double().mean().item())
            return means[99] / means[299]  # beyond the start, where momentum lags

        rates.append(math.log(run_local(1, work)[0]))
    assert rates[1] == pytest.approx(rates[0], rel=0.02)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_each_worker_clips_its_own_gradient_before_accumulating(scope):
    """The 2-norm of what N workers accumulate is at most clip_norm / sqrt(N) each."""

    def work(comm):
        weights = [nn.Parameter(torch.zeros(30, 40)), nn.Parameter(torch.zeros(50, 40))]
        optimizer = DistributedOptimizer(
            torch.optim.SGD(weights, lr=0.0),
            [("a", weights[0]), ("b", weights[1])],
            comm=comm,
            compression=Compression(density=0.001, clip_norm=2.0, clip_scope=scope),
        )
        added = []
        exchange_add = optimizer._exchange.add

        def add(name, grad_N, scale, *rest):
            added.append(grad_N * scale)
            exchange_add(name, grad_N, scale, *rest)

        optimizer._exchange.add = add
        large = 10.0 if comm.rank == 0 else 1e-4
        sum((weight * large).sum() for weight in weights).backward()
        optimizer.step()
        return [grad.norm().item() for grad in added]

    clipped, small = run_local(4, work)[:2]
    bound = 2.0 / math.sqrt(4)
    if scope == "global":
        assert math.hypot(*clipped) == pytest.approx(bound, rel=1e-4)
    else:
        assert clipped == pytest.approx([bound / math.sqrt(2)] * 2, rel=1e-4)
    assert sorted(small) == pytest.approx(sorted([1e-4 * math.sqrt(n) for n in (1200, 2000)]))


def test_a_parameter_without_gradient_counts_as_zero():
    def work(comm):
        used, unused = nn.Parameter(torch.ones(30, 40)), nn.Parameter(torch.ones(30, 40))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([used, unused], lr=1.0), [("u", used), ("n", unused)], comm=comm
        )
        chosen = [used, unused] if comm.rank == 0 else [used]
        sum(p.sum() for p in chosen).backward()
        optimizer.step()
        return used.mean().item(), unused.mean().item()

    assert run_local(2, work) == [(0.0, 0.5), (0.0, 0.5)]


def test_exchange_starts_during_backward():
    def work(comm):
        model = make_model()
        optimizer = DistributedOptimizer(
            momentum_sgd(model.parameters()), model.named_parameters(), comm=comm, bucket_bytes=1
        )
        backward(model, *next(batches(1, 1)))
        return len(optimizer._exchange._under_way), len(optimizer.buckets)

    assert run_local(1, work) == [(3, 4)]  # the last one leaves in step()


def test_gradient_memory_is_given_up_when_accumulated():
    def work(comm):
        model = make_model()
        optimizer = DistributedOptimizer(
            momentum_sgd(model.parameters()), model.named_parameters(), comm=comm
        )
        backward(model, *next(batches(1, 1)))
        return [type(p.grad) for p in model.parameters() if optimizer is not None]

    assert run_local(1, work) == [[HandedOver] * 4]


def test_misuse_is_an_error_that_says_what_to_do():
    def work(comm):
        model = make_model()
        named = list(model.named_parameters())
        for wrong, complaint in (
            (named[:-1], "that named_parameters lacks"),
            ([*named, named[0]], "two parameters are named 0.weight"),
        ):
            with pytest.raises(ValueError, match=complaint):
                DistributedOptimizer(momentum_sgd(model.parameters()), wrong, comm=comm)
        optimizer = DistributedOptimizer(
            momentum_sgd(model.parameters()), named, comm=comm, compression=Compression(),
            bucket_bytes=1,
        )  # fmt: skip
        batch = next(batches(1, 1))
        backward(model, *batch)
        with pytest.raises(RuntimeError, match="zero_grad"):
            optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="2 times without a step"):
            backward(model, *batch)
        optimizer.step()
        with pytest.raises(ValueError, match="density is 0"):
            optimizer.set_density(0)
        optimizer.param_groups[0]["dampening"] = 0.5
        with pytest.raises(ValueError, match="no dampening"):
            backward(model, *batch)

    run_local(1, work)


def test_ranks_with_different_parameters_are_told_so():
    def work(comm):
        model = nn.Linear(3, 4 + comm.rank)
        DistributedOptimizer(momentum_sgd(model.parameters()), model.named_parameters(), comm=comm)

    with pytest.raises(ValueError, match=r"rank 0 has parameter .* where rank 1 has"):
        run_local(2, work)


def test_everyone_starts_from_rank_0s_parameters():
    def work(comm):
        weight = nn.Parameter(torch.full((3, 4), float(comm.rank)))
        DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), [("w", weight)], comm=comm)
        return weight.tolist()

    assert run_local(2, work) == [[[0.0] * 4] * 3] * 2


def test_gradients_that_would_not_be_exchanged_are_refused():
    def work(comm):
        model = make_model()
        frozen = model[0].weight.requires_grad_(False)
        optimizer = DistributedOptimizer(
            torch.optim.Adam(model.parameters()), model.named_parameters(), comm=comm
        )
        backward(model, *next(batches(1, 1)))
        optimizer.step()
        frozen.requires_grad_(True)
        optimizer.zero_grad()
        backward(model, *next(batches(1, 1)))
        with pytest.raises(RuntimeError, match="after unfreezing or adding parameters close"):
            optimizer.step()
        with pytest.raises(NotImplementedError, match="laid out once"):
            optimizer.add_param_group({"params": [frozen]})
        with pytest.raises(ValueError, match="LBFGS"):
            DistributedOptimizer(
                torch.optim.LBFGS(model.parameters()), model.named_parameters(), comm=comm
            )

    run_local(1, work)


def test_two_optimizers_exchange_at_the_same_time():
    """As in a generative adversarial network: one backward, two optimizers."""

    def work(comm):
        weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
        optimizers = [
            DistributedOptimizer(torch.optim.SGD([w], lr=1.0), [("w", w)], comm=comm)
            for w in weights
        ]
        names = {optimizer._exchange.route.scope for optimizer in optimizers}
        (weights[0].sum() + 2 * weights[1].sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
        return sorted(names), [w.mean().item() for w in weights]

    assert run_local(2, work) == [(["exchange0", "exchange1"], [0.0, -1.0])] * 2


def test_ranks_with_different_settings_are_told_so():
    def work(comm):
        model = make_model()
        DistributedOptimizer(
            momentum_sgd(model.parameters()), model.named_parameters(), comm=comm,
            compression=Compression(density=0.1 / (1 + comm.rank)),
        )  # fmt: skip

    with pytest.raises(ValueError, match="give all ranks the same"):
        run_local(2, work)


@pytest.mark.parametrize("clip_scope", ["global", "tensor"])
def test_nothing_waits_inside_backward(clip_scope):
    """The predecessors' clipping ran a blocking, unnamed collective inside backward hooks."""

    class Watching(Recording):
        in_backward = False

        def all_gather_async(self, tensor, name):
            return self._watch(super().all_gather_async(tensor, name))

        def all_reduce_async(self, tensor, name):
            return self._watch(super().all_reduce_async(tensor, name))

        def _watch(self, handle):
            wait = handle.wait

            def checked():
                assert handle.poll() or not self.in_backward, "waited inside backward"
                return wait()

            handle.wait = checked
            return handle

    def work(comm):
        model, watching = make_model(), Watching(comm)
        optimizer = DistributedOptimizer(
            momentum_sgd(model.parameters()), model.named_parameters(), comm=watching,
            compression=Compression(density=0.02, clip_norm=1.0, clip_scope=clip_scope),
            bucket_bytes=1,
        )  # fmt: skip
        watching.in_backward = True
        backward(model, *next(batches(1, 1)))
        watching.in_backward = False
        num_started = len(watching.names)
        optimizer.step()
        assert all(watching.names)
        return num_started, sum("compared" not in name for name in watching.names)

    # Each tensor's own norm lets the exchange overlap backward; the global one cannot.
    assert run_local(2, work) == [(0 if clip_scope == "global" else 3, 4)] * 2


def test_residual_is_not_the_gradients_memory():
    def work(comm):
        weight = nn.Parameter(torch.zeros(40, 50))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1), [("w", weight)], comm=comm,
            compression=Compression(density=0.01),
        )  # fmt: skip
        kept = torch.ones(40, 50)
        weight.backward(kept)
        optimizer.step()
        kept.fill_(1e9)
        return optimizer.compensation.residual["w"].max().item()

    assert run_local(1, work) == [1.0]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", [None, "global", "tensor"])
@pytest.mark.parametrize("make", [plain_sgd, sparse_adam])
def test_row_sparse_gradients_train_as_dense_ones_would(make, clip, micro_batches):
    """Three ranks with rows of their own, against one optimizer on the joined batch."""

    def tables(sparse):
        table = nn.EmbeddingBag(50, 4, sparse=sparse, mode="sum")
        with torch.no_grad():
            table.weight.copy_(torch.arange(200.0).view(50, 4).sin())
        return table

    def backward(table, rank, step, part):
        rows = torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(9 * step + rank))
        loss = (table((rows + part) % 50).tanh() ** 2).mean() / micro_batches
        loss.backward()

    def work(comm):
        table = tables(True)
        optimizer = DistributedOptimizer(
            make(table.parameters()), table.named_parameters(), comm=comm,
            compression=Compression(density=0.1, momentum_correction=False, clip_norm=clip and 9.0,
                                    clip_scope=clip or "global"),
            micro_batches_per_step=micro_batches, row_sparse=row_sparse_names(table),
        )  # fmt: skip
        for step in range(4):
            for part in range(micro_batches):
                backward(table, comm.rank, step, part)
            optimizer.step()
            assert table.weight.grad.is_sparse
            optimizer.zero_grad()
        return table.weight.detach(), optimizer.stats.row_bytes

    results = run_local(3, work)
    table = tables(make is sparse_adam)
    optimizer = make(table.parameters())
    for step in range(4):
        for rank in range(3):
            for part in range(micro_batches):
                backward(table, rank, step, part)
        table.weight.grad = table.weight.grad / 3
        optimizer.step()
        optimizer.zero_grad()
    for weight, row_bytes in results:
        torch.testing.assert_close(weight, table.weight)
        assert torch.equal(weight, results[0][0])
        assert 0 < row_bytes < 4 * 200 + 100


def test_gradients_of_another_layout_than_announced_are_refused_with_the_remedy():
    def work(comm, sparse, names):
        table = nn.Embedding(10, 4, sparse=sparse)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(table.parameters(), lr=0.1), table.named_parameters(), comm=comm,
            row_sparse=names,
        )  # fmt: skip
        if sparse:  # all know by now that it has none, or dense ones
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(TypeError, match=r"row_sparse_names\(model\) finds them"):
            table(torch.tensor([1])).sum().backward()
        return optimizer

    run_local(1, lambda comm: work(comm, True, ()))
    run_local(1, lambda comm: work(comm, False, ["weight"]))
    with pytest.raises(ValueError, match="row_sparse names other, which is not a parameter"):
        run_local(1, lambda comm: work(comm, True, ["other"]))


def test_schedulers_take_it_for_an_optimizer():
    def work(comm):
        model = make_model()
        optimizer = DistributedOptimizer(
            momentum_sgd(model.parameters()), model.named_parameters(), comm=comm
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        backward(model, *next(batches(1, 1)))
        optimizer.step()
        scheduler.step()
        return optimizer.inner.param_groups[0]["lr"]

    assert run_local(1, work) == [0.05]


def test_bfloat16_parameters_are_exchanged_in_float32():
    def work(comm):
        weight = nn.Parameter(torch.zeros(30, 40, dtype=torch.bfloat16))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0),
            [("w", weight)],
            comm=comm,
            compression=Compression(density=0.01),
        )
        weight.grad = None
        (weight * (comm.rank + 1)).sum().backward()
        optimizer.step()
        return weight

    for weight in run_local(2, work):
        assert weight.dtype == torch.bfloat16
        assert weight.count_nonzero() == 12
        assert weight.min() == -1.5


def test_restored_worker_state_continues_to_the_bit():
    compression = Compression(density=0.02, min_numel=100)
    initial = make_model()

    def run(comm, stop):
        model = copy.deepcopy(initial)
        made = []

        def restart():
            made.append(
                DistributedOptimizer(
                    momentum_sgd(model.parameters()),
                    model.named_parameters(),
                    comm=comm,
                    compression=compression,
                )
            )
            return made[-1]

        optimizer = restart()
        for number, (inputs, labels) in enumerate(batches(10, 2)):
            if number == stop:
                saved = copy.deepcopy((optimizer.state_dict(), optimizer.worker_state_dict()))
                model = copy.deepcopy(model)
                optimizer = restart()
                optimizer.load_state_dict(saved[0])
                optimizer.load_worker_state_dict(saved[1])
            half = slice(comm.rank * BATCH, (comm.rank + 1) * BATCH)
            backward(model, inputs[half], labels[half])
            optimizer.step()
            optimizer.zero_grad()
        return parameters(model)

    undisturbed = run_local(2, lambda comm: run(comm, None))
    resumed = run_local(2, lambda comm: run(comm, 5))
    assert torch.equal(undisturbed[0], resumed[0])
    assert torch.equal(undisturbed[1], resumed[1])


def test_a_rank_without_rows_takes_part():
    def work(comm):
        table = nn.Embedding(10, 4, sparse=True)
        with torch.no_grad():
            table.weight.zero_()
        optimizer = DistributedOptimizer(
            plain_sgd(table.parameters()), table.named_parameters(), comm=comm,
            row_sparse=["weight"],
        )  # fmt: skip
        rows = torch.zeros(0 if comm.rank == 1 else 2, dtype=torch.int64)
        table(rows).sum().backward()
        optimizer.step()
        return table.weight[0, 0].item()

    assert run_local(2, work) == [-0.5] * 2  # two rows of one rank, over two ranks, times lr 0.5


def test_only_trainable_weights_of_sparse_layers_alone_are_row_sparse():
    model = nn.ModuleDict({
        "plain": nn.Embedding(5, 3), "mine": nn.Embedding(5, 3, sparse=True),
        "frozen": nn.Embedding(5, 3, sparse=True), "tied": nn.Embedding(5, 3, sparse=True),
        "decoder": nn.Linear(3, 5, bias=False),
    })  # fmt: skip
    model["frozen"].weight.requires_grad_(False)
    model["decoder"].weight = model["tied"].weight
    assert row_sparse_names(model) == ["mine.weight"]


def test_momentum_of_rows_is_kept_in_a_group_of_their_own_and_else_refused():
    def work(comm, groups, **settings):
        table, body = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)
        named = [("table", table.weight), *body.named_parameters()]
        parameters = [p for _, p in named]
        split = [{"params": parameters[:1]}, {"params": parameters[1:]}]
        inner = torch.optim.SGD(split if groups else parameters, lr=0.1, **settings)
        return DistributedOptimizer(
            inner, named, comm=comm, compression=Compression(density=0.1), row_sparse=["table"]
        )  # fmt: skip

    (optimizer,) = run_local(1, lambda comm: work(comm, True, momentum=0.9))
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9]
    with optimizer._momentum.in_correction(0.9):  # while SGD steps
        assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.0]
    with pytest.raises(ValueError, match="give row-sparse parameters a group of their own"):
        run_local(1, lambda comm: work(comm, False, momentum=0.9))
    with pytest.raises(ValueError, match="weight_decay is 0.1 for a row-sparse parameter"):
        run_local(1, lambda comm: work(comm, True, weight_decay=0.1))


@pytest.mark.parametrize("load_first", [True, False])
def test_a_resumed_run_goes_on_to_the_bit_where_the_density_changes(load_first):
    compression = Compression(density=0.01, density_warmup_epochs=2, exact_below=0, min_numel=100)

    def make(comm):
        weight = nn.Parameter(torch.zeros(200, 100))
        return weight, DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1, momentum=0.9), [("w", weight)], comm=comm,
            compression=compression,
        )  # fmt: skip

    def go_on(weight, optimizer, rank, epoch):
        optimizer.set_epoch(epoch)
        for step in range(4):
            seed = 100 * epoch + 10 * step + rank
            weight.backward(torch.randn(200, 100, generator=torch.Generator().manual_seed(seed)))
            optimizer.step()

    def work(comm):
        weight, optimizer = make(comm)
        go_on(weight, optimizer, comm.rank, 0)
        go_on(weight, optimizer, comm.rank, 1)
        saved, kept = copy.deepcopy(optimizer.worker_state_dict()), weight.detach().clone()
        again, resumed = make(comm)
        again.data.copy_(kept)
        if load_first:
            resumed.load_worker_state_dict(saved)
            resumed.set_epoch(2)
        else:
            resumed.set_epoch(2)
            resumed.load_worker_state_dict(saved)
        for one, other in ((weight, optimizer), (again, resumed)):
            go_on(one, other, comm.rank, 2)
            go_on(one, other, comm.rank, 3)
        assert torch.equal(weight, again)

    run_local(2, work)


def test_lazy_parameters_and_wrong_givens_are_refused_with_the_remedy():
    def work(comm):
        model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
        for parameters in (model.parameters(), model[0].parameters()):
            with pytest.raises(ValueError, match="lazy parameter.* run one forward pass"):
                DistributedOptimizer(
                    torch.optim.SGD(parameters, lr=0.1), model.named_parameters(), comm=comm
                )
        model(torch.randn(2, 3))
        inner = plain_sgd(model.parameters())
        with pytest.raises(TypeError, match="allowed: dgc.Compression"):
            DistributedOptimizer(inner, model.named_parameters(), comm=comm, compression="fp16")
        optimizer = DistributedOptimizer(inner, model.named_parameters(), comm=comm, bucket_bytes=1)
        with pytest.raises(ValueError, match="a distributed optimizer itself"):
            DistributedOptimizer(optimizer, model.named_parameters(), comm=comm)
        model(torch.randn(2, 3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"requires_grad_\(False\)"):
            optimizer.zero_grad()
        optimizer.step()

    run_local(1, work)


def test_the_backward_pass_of_another_loss_can_be_kept_from_a_network():
    """The remedies of zero_grad()'s message: a generator is trained through a discriminator."""

    def work(comm, remedy):
        generator, discriminator = nn.Linear(3, 4), nn.Linear(4, 1)
        of_generator, of_discriminator = (
            DistributedOptimizer(plain_sgd(m.parameters()), m.named_parameters(), comm=comm)
            for m in (generator, discriminator)
        )
        for _ in range(3):
            made = generator(torch.randn(2, 3))
            discriminator(made.detach()).sum().backward()
            of_discriminator.step()
            of_discriminator.zero_grad()
            if remedy == "requires_grad_":
                discriminator.requires_grad_(False)
                discriminator(made).sum().backward()
                discriminator.requires_grad_(True)
            else:
                discriminator(made).sum().backward(inputs=list(generator.parameters()))
            of_generator.step()
            of_generator.zero_grad()
        of_discriminator.check_replicas()
        of_generator.check_replicas()

    run_local(2, lambda comm: work(comm, "requires_grad_"))
    run_local(2, lambda comm: work(comm, "inputs"))


def factored_adam(parameters):
    return FactoredAdam(parameters, lr=0.01, betas=(0.0, 0.999), min_compressed_numel=0)


@pytest.mark.parametrize("make", [momentum_sgd, torch.optim.Adam, factored_adam])
@pytest.mark.parametrize("compiled", ["step", "train step"])
def test_a_compiled_step_is_the_step(make, compiled):
    def work(comm, compile):
        model = make_model()
        optimizer = DistributedOptimizer(
            make(model.parameters()), model.named_parameters(), comm=comm,
            compression=Compression(density=0.05, min_numel=100),
        )  # fmt: skip
        step = compile(optimizer.step) if compiled == "step" else optimizer.step

        def train_step(inputs, labels):
            optimizer.zero_grad()
            backward(model, inputs, labels)
            step()

        if compiled == "train step":
            train_step = compile(train_step)
        for inputs, labels in batches(5, 1):
            train_step(inputs, labels)
        return parameters(model)

    (plain,) = run_local(1, lambda comm: work(comm, lambda function: function))
    eager = functools.partial(torch.compile, backend="eager")
    (result,) = run_local(1, lambda comm: work(comm, eager))
    assert torch.equal(result, plain)
