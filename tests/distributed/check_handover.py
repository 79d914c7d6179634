"""Run by test_handover.py on 4, 2, 3 and 4 real ranks in turn: each job takes over from the last.

argv: a folder for what the ranks leave. Each job compares what has not been sent, as the method
weighs it, with that of the job before: in float32 they are equal to the bit.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm.job import job
from optim import FactoredAdam

NUM_STEPS = 5
KINDS = {
    "dgc_sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "recommended": lambda p: FactoredAdam(p, lr=0.01, betas=(0.0, 0.999), min_compressed_numel=0),
}


def mass(workers, kind):
    names = workers[0]["compensation"][kind]
    sums = {n: sum(w["compensation"][kind][n].double() for w in workers) for n in names}
    return {name: (total / len(workers)).float() for name, total in sums.items()}


def check(comm, folder, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 10))
    optimizer = DistributedOptimizer(
        make(model.parameters()), model.named_parameters(), comm=comm, bucket_bytes=2**14,
        compression=Compression(density=0.01, min_numel=100),
    )  # fmt: skip
    before = [torch.load(path) for path in sorted(folder.glob("rank-*.pt"))]
    comm.barrier("all have read")
    if before:
        model.load_state_dict(before[0]["model"])
        optimizer.load_state_dict(before[0]["optimizer"])
        workers = [state["worker"] for state in before]
        optimizer.load_worker_states(list(enumerate(workers))[comm.rank :: comm.world_size])
        now = comm.all_gather_object(optimizer.worker_state_dict())
        for kind in ("residual", "velocity"):
            then, here = mass(workers, kind), mass(now, kind)
            assert then.keys() == here.keys()
            assert all(torch.equal(then[name], here[name]) for name in then)
        assert sum(v.abs().sum() for v in mass(now, "residual").values()) > 0
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        inputs = torch.randn(16, 64, generator=generator)
        nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.check_replicas()
    for path in sorted(folder.glob("rank-*.pt"))[comm.world_size :] if comm.rank == 0 else ():
        path.unlink()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "worker": optimizer.worker_state_dict()}, folder / f"rank-{comm.rank}.pt")
    comm.barrier("all have saved")
    optimizer.close()
    return len(before)


with job() as comm:
    for name, make in KINDS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True, parents=True)
        num_before = check(comm, folder, make)
    print(f"rank {comm.rank} of {comm.world_size} went on from {num_before}", flush=True)
