"""Run by test_own_loop.py: a person's loop with the README's five lines changed.

argv: `horovod`: one that used Horovod's optimizer; `torch`: one that used DistributedDataParallel.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from dgc import Compression, DistributedOptimizer
from optim import FactoredAdam

if sys.argv[1] == "horovod":
    import horovod.torch as hvd

    from dgc.comm import HorovodComm as Comm

    hvd.init()
    rank, size, all_gather = hvd.rank(), hvd.size(), hvd.allgather_object
else:
    from dgc.comm import TorchComm as Comm

    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    def all_gather(value):
        found = [None] * size
        dist.all_gather_object(found, value)
        return found


torch.manual_seed(rank)
model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10))
optimizer = DistributedOptimizer(
    FactoredAdam(model.parameters(), lr=1e-3, betas=(0.0, 0.999)), model.named_parameters(),
    comm=Comm(), compression=Compression(density=0.01, residual_dtype="bfloat16",
                                         update_scale=4.0, share_statistics=0.5),
)  # fmt: skip
losses = []
for _ in range(200):
    inputs = torch.randn(32, 40)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

vector = nn.utils.parameters_to_vector(model.parameters()).detach()
for other in all_gather(vector):
    assert torch.equal(other, vector), "replicas differ"
assert sum(losses[-20:]) < 0.6 * sum(losses[:20]), losses[::20]
assert optimizer.worker_state_bytes()["residual"] == 2 * (40 * 300 + 300 * 10)
print(f"rank {rank} of {size} learns", flush=True)
if sys.argv[1] == "torch":
    dist.destroy_process_group()
