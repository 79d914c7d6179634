"""The optimizers on a GPU against the same on the CPU; state that moves between the two."""

import copy
import os

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.optim.helpers import EVERY_OPTIMIZER, gradients, parameter, row_sparse

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    if os.environ.get("REQUIRE_GPU"):
        pytest.fail("REQUIRE_GPU is set and torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPES = [(33, 40), (6, 2, 9), (7,)]
every_optimizer = pytest.mark.parametrize("name", EVERY_OPTIMIZER)


class Model(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        values = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
        self.values = torch.nn.ParameterList(values)


def train(optimizer, model, turns):
    """Steps of dense, row-sparse and element-sparse gradients, which depend on the turn alone."""
    for turn in turns:
        for i, p in enumerate(model.values):
            (grad,) = gradients(1, *p.shape, dtype=p.dtype, seed=turn)
            if turn % 3 == 1 and i < 2:
                grad = row_sparse(range(0, len(p), 2), grad[::2], p.shape)
            elif turn % 3 == 2:
                grad = (grad * (grad > 0)).to_sparse()
            p.grad = grad.to(p.device)
        optimizer.step()


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_gpu_steps_as_a_cpu_does(name, dtype):
    found = []
    for device in (GPU, CPU):
        model = Model(dtype).to(device)
        train(EVERY_OPTIMIZER[name](model.parameters()), model, range(6))
        found.append([p.detach().cpu() for p in model.values])
    for on_gpu, on_cpu in zip(*found, strict=True):
        assert_close(on_gpu, on_cpu)


@every_optimizer
@pytest.mark.parametrize(("source", "target"), [(CPU, GPU), (GPU, CPU)], ids=str)
@pytest.mark.parametrize("way", ["load", "move"])
def test_state_goes_to_the_device_of_its_parameter(name, source, target, way):
    model = Model().to(source)
    optimizer = EVERY_OPTIMIZER[name](model.parameters())
    train(optimizer, model, range(3))
    other = copy.deepcopy(model).to(target)
    resumed = EVERY_OPTIMIZER[name](other.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    if way == "move":  # the state follows in the first step
        other, resumed = model.to(target), optimizer
    train(resumed, other, range(3, 6))
    straight = Model().to(source)
    train(EVERY_OPTIMIZER[name](straight.parameters()), straight, range(6))
    for p, q in zip(other.values, straight.values, strict=True):
        assert_close(p.detach().cpu(), q.detach().cpu())
    for state in resumed.state.values():
        for key, value in state.items():
            stays = key == "step" or key.endswith("_seeds")
            assert value.device == (CPU if stays else target), key


def test_capture_in_a_cuda_graph_is_refused():
    p = torch.nn.Parameter(torch.zeros(3, 4, device=GPU))
    optimizer, other = EVERY_OPTIMIZER["FactoredAdam"]([p]), torch.zeros(3, device=GPU)
    p.grad = torch.ones(3, 4, device=GPU)
    optimizer.step()
    before = p.detach().clone()
    with (
        pytest.raises(RuntimeError, match="a CUDA graph is being captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        other.add_(1)  # an empty graph is warned of
        optimizer.step()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1
