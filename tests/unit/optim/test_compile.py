"""Steps under torch.compile: alone, and within a function of forward, backward and step."""

import pytest
import torch
from torch import nn

from tests.unit.optim.helpers import EVERY_OPTIMIZER, assert_same_state, copy_of_state

NUM_STEPS = 4


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles by itself: the compiler gives up after so many versions of a function."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(name, compiled, backend="eager"):
    """Return parameters, state and what hooks saw, of a model of several tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer, seen = EVERY_OPTIMIZER[name](model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step = torch.compile(optimizer.step, backend=backend) if compiled == "step" else optimizer.step

    def one(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        step()
        return loss.detach()

    if compiled == "all":
        one = torch.compile(one, backend=backend)
    generator = torch.Generator().manual_seed(1)
    losses = [one(torch.randn(5, 6, generator=generator)).item() for _ in range(NUM_STEPS)]
    return losses, [p.detach() for p in model.parameters()], copy_of_state(optimizer), seen


BACKENDS = [*((name, "eager") for name in EVERY_OPTIMIZER), ("SketchAdam", "aot_eager")]


@pytest.mark.one_in(7)
@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@pytest.mark.parametrize("compiled", ["step", "all"])
def test_a_compiled_step_gives_the_same_bits(name, compiled, backend):
    losses, parameters, state, seen = train(name, None)
    found = train(name, compiled, backend)
    assert found[0] == losses and found[3] == seen
    assert all(map(torch.equal, found[1], parameters))
    assert_same_state(found[2], state)
    assert [kept["step"].item() for kept in found[2]] == [NUM_STEPS] * len(parameters)
