"""Run by test_optim_state.py on real ranks: Horovod's broadcast of optim's optimizers."""

import sys

import torch

import optim
from dgc.comm.job import job

MAKERS = [
    lambda p: optim.SM3(p, momentum=0.9, weight_decay=0.1),
    lambda p: optim.SketchAdam(p, min_compressed_numel=0, weight_decay=0.1),
    lambda p: optim.SketchMomentum(p, lr=0.1, min_compressed_numel=0),
    lambda p: optim.SketchAdagrad(p, lr=0.1, min_compressed_numel=0),
    lambda p: optim.FactoredAdam(p, min_compressed_numel=0),
]


def check(comm, make, dtype, num_steps):
    """Broadcast rank 0's state after steps that differ between ranks, or before any."""
    import horovod.torch as hvd

    generator = torch.Generator().manual_seed(comm.rank)
    shapes = ((40, 6), (4, 3, 2), (5,))
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = make(parameters)
    optimizer.param_groups[0]["lr"] = 0.01 * (comm.rank + 1)
    for _ in range(num_steps + comm.rank if num_steps else 0):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    before = [p.detach().clone() for p in parameters]
    own = optimizer.state_dict()["state"]
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for p, q in zip(parameters, before, strict=True):
        assert torch.equal(p, q), "the broadcast moved a parameter"
    assert optimizer.param_groups[0]["lr"] == 0.01
    everyone = comm.all_gather_object(
        {(i, k): (v.dtype, v.tolist()) for i, s in own.items() for k, v in s.items()}
    )
    assert all(state == everyone[0] for state in everyone), "a rank has another state than rank 0"
    assert everyone[0][(0, "step")][1] == num_steps
    dtypes = {dtype for (_, name), (dtype, _) in everyone[0].items() if not name.endswith("_seeds")}
    assert dtypes == {torch.float32}
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters)


def check_wrapped(comm):
    """Horovod's own DistributedOptimizer makes a subclass anew from the groups: it must fit."""
    import horovod.torch as hvd

    model = torch.nn.Linear(30, 20)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    inner = optim.SketchAdam(model.parameters(), lr=0.01, min_compressed_numel=0, depth=5)
    optimizer = hvd.DistributedOptimizer(inner, named_parameters=model.named_parameters())
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.state[model.weight]["exp_avg_sq"].shape[0] == 5
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 30) + comm.rank).square().mean().backward()
        optimizer.step()
    everyone = comm.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(each == everyone[0] for each in everyone), "ranks have drifted apart"


with job() as comm:
    check_wrapped(comm)
    for make in MAKERS:
        for dtype in (torch.float32, torch.bfloat16):
            for num_steps in (0, 3):
                check(comm, make, dtype, num_steps)
    assert comm.controller == sys.argv[1], comm.controller
    print(f"rank {comm.rank} of {comm.world_size} agrees", flush=True)
