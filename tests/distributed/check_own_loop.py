"""Run by test_own_loop.py: a person's Horovod loop with the README's five lines changed."""

import horovod.torch as hvd
import torch
from torch import nn

from dgc import Compression, DistributedOptimizer
from dgc.comm import HorovodComm
from optim import FactoredAdam

hvd.init()
torch.manual_seed(hvd.rank())
model = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 10))
optimizer = DistributedOptimizer(
    FactoredAdam(model.parameters(), lr=1e-3, betas=(0.0, 0.999)), model.named_parameters(),
    comm=HorovodComm(), compression=Compression(density=0.01, residual_dtype="bfloat16",
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
for other in hvd.allgather_object(vector):
    assert torch.equal(other, vector), "replicas differ"
assert sum(losses[-20:]) < 0.6 * sum(losses[:20]), losses[::20]
assert optimizer.worker_state_bytes()["residual"] == 2 * (40 * 300 + 300 * 10)
print(f"rank {hvd.rank()} of {hvd.size()} learns", flush=True)
