"""SGD's momentum in the correction: its groups never show it, and all that a person does with them
holds: schedules, checkpoints from before and after, close() and make anew."""

import copy

import pytest
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.local import run_local

WHOLE = Compression(density=1.0)  # all is sent: then it is SGD itself
START = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))


def sgd(weight, **settings):
    return torch.optim.SGD([weight], **{"lr": 0.1, "momentum": 0.9, **settings})


def wrap(inner, weight, comm, compression=WHOLE, **settings):
    return DistributedOptimizer(
        inner, [("w", weight)], comm=comm, compression=compression, **settings
    )


def gradient(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(START.shape, generator=generator)


def step_together(weight, optimizer, step, comm):
    (weight * gradient(step, comm.rank)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def step_alone(weight, optimizer, step, world_size):
    weight.grad = sum(gradient(step, rank) for rank in range(world_size)) / world_size
    optimizer.step()


def own(inner):
    return [{k: g[k] for k in ("momentum", "nesterov", "weight_decay")} for g in inner.param_groups]


def test_groups_keep_their_options_in_use_closed_and_anew():
    def work(comm):
        weight = nn.Parameter(START.clone())
        inner = sgd(weight, nesterov=True, weight_decay=1e-4)
        before = own(inner)
        for _ in range(3):
            optimizer = wrap(inner, weight, comm, Compression(density=0.1))
            for step in range(2):
                assert own(inner) == before
                assert optimizer.compensation.momentum == 0.9 and optimizer.compensation.nesterov
                step_together(weight, optimizer, step, comm)
            assert own(inner) == before
            optimizer.close()
            assert own(inner) == before

        def fail():
            assert own(inner) == [{"momentum": 0.0, "nesterov": False, "weight_decay": decay}]
            raise OSError("within SGD's step")

        decay = 1e-4 / (1 - 0.9)
        optimizer, inner.step = wrap(inner, weight, comm), fail
        with pytest.raises(OSError, match="within SGD's step"):
            step_together(weight, optimizer, 0, comm)
        assert own(inner) == before

    run_local(1, work)


def one_cycle(optimizer):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.3, total_steps=20, base_momentum=0.5, max_momentum=0.9
    )
    return lambda step: scheduler.step()


def with_rests(optimizer):
    momenta = (0.9, 0.9, 0.0, 0.0, 0.7, 0.7, 0.0, 0.5)
    return lambda step: optimizer.param_groups[0].update(momentum=momenta[(step + 1) % 8])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("schedule", [one_cycle, with_rests])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_schedule_moves_the_momentum_as_it_does_in_sgd(schedule, nesterov, micro_batches):
    def work(comm):
        weight = nn.Parameter(START.clone())
        inner = sgd(weight, nesterov=nesterov)
        optimizer = wrap(inner, weight, comm, micro_batches_per_step=micro_batches)
        move = schedule(optimizer)
        for step in range(16):
            for _ in range(micro_batches):
                (weight * gradient(step, comm.rank) / micro_batches).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            move(step)
            if step == 9:  # taken up again in the middle
                saved = copy.deepcopy((optimizer.state_dict(), optimizer.worker_state_dict()))
                optimizer.load_state_dict(saved[0])
                optimizer.load_worker_state_dict(saved[1])
        return weight.detach()

    alone = nn.Parameter(START.clone())
    optimizer = sgd(alone, nesterov=nesterov)
    move = schedule(optimizer)
    for step in range(16):
        step_alone(alone, optimizer, step, 2)
        move(step)
    for weight in run_local(2, work):
        torch.testing.assert_close(weight, alone.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("when", ["before wrapping", "after", "after, in mid-run"])
@pytest.mark.parametrize("world_size, ranks_per_node", [(2, None), (4, 2)])
def test_a_dense_runs_checkpoint_goes_on(nesterov, when, world_size, ranks_per_node):
    """The momentum buffers, equal on all ranks, become velocities whose mean they are."""
    alone = nn.Parameter(START.clone())
    dense = sgd(alone, nesterov=nesterov)
    for step in range(4):
        step_alone(alone, dense, step, world_size)
    saved, kept = copy.deepcopy(dense.state_dict()), alone.detach().clone()
    for step in range(4, 9):
        step_alone(alone, dense, step, world_size)

    def work(comm):
        weight = nn.Parameter(kept.clone())
        inner = sgd(weight, nesterov=nesterov)
        if when == "before wrapping":
            inner.load_state_dict(saved)
        optimizer = wrap(inner, weight, comm)
        if when == "after, in mid-run":
            step_together(weight, optimizer, 0, comm)
            weight.data.copy_(kept)
        if when != "before wrapping":
            optimizer.load_state_dict(saved)
        for step in range(4, 9):
            step_together(weight, optimizer, step, comm)
        assert not inner.state  # the memory of the buffers is given up
        return weight.detach()

    for weight in run_local(world_size, work, ranks_per_node):
        torch.testing.assert_close(weight, alone.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("velocity_dtype", ["float32", "bfloat16", "int8"])
def test_a_velocity_begins_in_the_type_that_velocities_have(velocity_dtype):
    def work(comm):
        weight = nn.Parameter(START.clone())
        inner = sgd(weight, lr=0.0)
        inner.state[weight]["momentum_buffer"] = START.clone()
        optimizer = wrap(
            inner, weight, comm, Compression(density=0.01, velocity_dtype=velocity_dtype)
        )
        (weight * 0).sum().backward()
        optimizer.synchronize()
        residual = optimizer.compensation.residual["w"].view(START.shape)
        waits = residual != 0  # the rest is on its way
        assert waits.sum() > 1100
        torch.testing.assert_close(residual[waits], 0.9 * START[waits], atol=0.04, rtol=0.02)
        return optimizer.worker_state_bytes()["velocity"]

    (num_bytes,) = run_local(1, work)
    assert num_bytes // START.numel() == {"float32": 4, "bfloat16": 2, "int8": 1}[velocity_dtype]


def older(state, momentum):
    """A state dict as it was when SGD's momentum was taken out of the groups."""
    groups = copy.deepcopy(state["param_groups"])
    for group in groups:
        group.update(momentum=0.0, nesterov=False)
        group["weight_decay"] /= 1 - momentum
    return {"state": {}, "param_groups": groups}


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_older_checkpoints_of_ours_are_known_and_others_taken_as_they_are(weight_decay):
    def work(comm):
        weight = nn.Parameter(START.clone())
        inner = sgd(weight, nesterov=True, weight_decay=weight_decay)
        optimizer = wrap(inner, weight, comm)
        saved = copy.deepcopy(optimizer.state_dict())
        before = own(inner)
        optimizer.load_state_dict(older(saved, 0.9))
        assert own(inner) == before
        saved["param_groups"][0].update(momentum=0.0, nesterov=False)  # of ours, as it is now
        optimizer.load_state_dict(saved)
        assert own(inner) == [{"momentum": 0.0, "nesterov": False, "weight_decay": weight_decay}]
        step_together(weight, optimizer, 0, comm)
        assert optimizer.compensation.momentum == 0
        if weight_decay:  # of a plain SGD without momentum
            optimizer.load_state_dict(sgd(weight, weight_decay=weight_decay).state_dict())
            plain = sgd(weight, momentum=0, weight_decay=weight_decay).state_dict()
            optimizer.load_state_dict(plain)
            assert own(inner)[0] == {k: plain["param_groups"][0][k] for k in own(inner)[0]}

    run_local(1, work)


def test_our_checkpoint_can_be_loaded_by_torchs_sgd_and_then_be_wrapped():
    def work(comm):
        weight = nn.Parameter(START.clone())
        optimizer = wrap(sgd(weight, weight_decay=1e-4), weight, comm)
        step_together(weight, optimizer, 0, comm)
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["state"], "Horovod would step an optimizer without state"
        optimizer.close()
        inner = sgd(weight, lr=1.0)
        inner.load_state_dict(saved)
        assert own(inner)[0]["weight_decay"] == 1e-4 and inner.param_groups[0]["lr"] == 0.1
        weight.grad = torch.ones_like(weight)
        inner.step()  # alone, too
        again = wrap(inner, weight, comm)
        step_together(weight, again, 1, comm)
        return again.compensation.momentum, own(inner)[0]["momentum"]

    assert run_local(1, work) == [(0.9, 0.9)]


def test_what_groups_share_is_not_changed_in_place():
    def work(comm):
        weights = [nn.Parameter(START.clone()) for _ in range(2)]
        lr, decay = torch.tensor(0.1), torch.tensor(1e-2)
        groups = [{"params": [w], "lr": lr, "weight_decay": decay} for w in weights]
        inner = torch.optim.SGD(groups, momentum=0.9)
        optimizer = DistributedOptimizer(
            inner, list(zip("ab", weights, strict=True)), comm=comm,
            compression=Compression(density=0.1),
        )  # fmt: skip
        for _ in range(2):
            sum((w * START).sum() for w in weights).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(g["lr"] is lr and g["weight_decay"] is decay for g in inner.param_groups)
        assert float(lr) == pytest.approx(0.1) and float(decay) == pytest.approx(1e-2)
        assert torch.equal(*weights)

    run_local(1, work)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"momentum": 0.5}, "one momentum for all parameters"),
        ({"dampening": 0.1}, "no dampening"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_momenta_that_part_in_mid_run_are_refused(change, complaint):
    def work(comm):
        weights = [nn.Parameter(START.clone()) for _ in range(2)]
        inner = torch.optim.SGD([{"params": [w]} for w in weights], lr=0.1, momentum=0.9)
        named = list(zip("ab", weights, strict=True))
        optimizer = DistributedOptimizer(inner, named, comm=comm, compression=WHOLE)
        inner.param_groups[1].update(change)
        with pytest.raises(ValueError, match=complaint):
            weights[0].sum().backward()
        optimizer.close()

    run_local(1, work)
