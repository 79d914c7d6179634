"""Forward passes that write parameters, which ranks would then not have alike."""

import pytest
import torch
from torch import nn

from dgc.comm.local import run_local
from engine.replicas import ReplicaError, agreed_hash, refuse_writes


class Written(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.weight, self.write = nn.Parameter(torch.ones(3)), write
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return x * self.weight


def replace(module):
    module.weight = nn.Parameter(module.weight * 2)


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(5, 4, max_norm=1.0), nn.Embedding(5, 4, max_norm=1e9),
     nn.Sequential(nn.EmbeddingBag(5, 4, max_norm=1.0)).append(nn.Flatten()),
     Written(lambda module: module.weight.mul_(2)), Written(replace)],
)  # fmt: skip
@pytest.mark.parametrize("is_training", [True, False])
def test_a_forward_that_writes_a_parameter_is_refused_by_its_name(module, is_training):
    module.train(is_training)
    inputs = torch.tensor([[0, 1, 2]])
    with pytest.raises(ReplicaError, match=r"the parameter (0\.)?weight of .* is written"):
        with refuse_writes(module):
            module(inputs)


class Flattening(nn.LSTM):
    def forward(self, x):
        with torch.no_grad():  # what flatten_parameters does on a GPU
            for parameter in self.parameters():
                parameter.set_(parameter.clone())
        return super().forward(x)


@pytest.mark.parametrize(
    "module",
    [Written(lambda module: module.seen.add_(1)), nn.LazyLinear(2), Flattening(3, 2)],
    ids=["buffer", "lazy", "flattened"],
)
def test_buffers_lazy_and_moved_parameters_may_be_written(module):
    with refuse_writes(module):
        module(torch.ones(1, 3))


def test_what_is_written_behind_torchs_back_is_named_when_replicas_are_compared():
    def work(comm, write):
        model = Written(lambda module: module.weight.data.add_(write * comm.rank))
        with refuse_writes(model):
            model(torch.ones(3))
        return agreed_hash(model, comm, "epoch 1")

    hashes = run_local(2, lambda comm: work(comm, 0))
    assert hashes[0] == hashes[1]
    with pytest.raises(ReplicaError, match="differ after epoch 1.* the first is weight. Does the"):
        run_local(2, lambda comm: work(comm, 1))
