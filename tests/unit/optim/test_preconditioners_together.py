"""Second moments of many tensors, fed and asked together: as one after another, on each side."""

import copy

import pytest
import torch
from torch import nn

from dgc.worker.statistics import Statistics
from optim import SM3, Adam, FactoredAdam, SketchAdam
from parsimony_kernels.runtime import choice
from parsimony_kernels.step import device, host, reference
from tests.unit.parsimony_kernels.conftest import emulated as emulated
from tests.unit.parsimony_kernels.step.test_batches import Operations

SHAPES = [(40, 50), (16, 8, 3, 3), (70, 1), (1, 70), (33,), (5, 260), (), (64, 64)]
NO_FIRST = {"betas": (0.0, 0.999)}
KINDS = {
    "full": lambda p: Adam(p, **NO_FIRST),
    "factored": lambda p: FactoredAdam(p, **NO_FIRST, min_compressed_numel=0),
    "cover": lambda p: SM3(p),
    "cover I": lambda p: SM3(p, variant="I"),
    "sketch": lambda p: SketchAdam(p, **NO_FIRST, min_compressed_numel=0),
}


class Many(Statistics):
    """Statistics of tensors of several kinds and shapes."""

    def __init__(self, kinds, dtype=torch.float32, shapes=SHAPES):
        self.dtype, self.shapes, self.optimizers = dtype, {}, []
        found = {}
        for kind in kinds:
            parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
            self.optimizers.append(KINDS[kind](parameters))
            for p in parameters:
                name = f"{kind} {tuple(p.shape)}"
                self.shapes[name] = p.shape
                found[name] = self.optimizers[-1].delegate_second_moment(p)
        super().__init__(found)

    def gradients(self, seed, num_parts=1):
        generator = torch.Generator().manual_seed(seed)
        of_scale = torch.float64 if self.dtype == torch.float64 else torch.float32
        return [
            (name, torch.randn(shape.numel(), generator=generator).to(self.dtype),
             torch.tensor([0.37], dtype=of_scale) if (number + seed) % 3 else None, num_parts)
            for number, (name, shape) in enumerate(self.shapes.items())
        ]  # fmt: skip

    def entries(self, seed):
        """Return what is asked, (name, count, first), and the positions."""
        generator, first, asked, positions = torch.Generator().manual_seed(seed), 1000, [], []
        for name, shape in self.shapes.items():
            count = min(shape.numel(), 1 + 5 * seed)
            chosen = torch.randperm(shape.numel(), generator=generator)[:count].sort().values
            asked.append((name, count, first))
            positions.append(first + chosen)
            first += shape.numel()
        return asked, torch.cat(positions)

    def state(self):
        return {(name, part): tensor.clone() for name, one in self.preconditioners.items()
                for part, tensor in one.tensors.items()}  # fmt: skip


def trained(many, together):
    """Feed five steps, one of two parts, one undone, one after a state was loaded; return roots."""
    roots = []
    for step in range(5):
        for part in range(num_parts := 2 if step == 2 else 1):
            given = many.gradients(10 * step + part, num_parts)[2 * (step == 3) :]
            for each in [given] if together else [[one] for one in given]:
                many.observe_together(each)
        asked, positions_K = many.entries(step)
        if together:
            roots.append(many.roots_together(asked, positions_K))
        else:
            parts = positions_K.split([count for _, count, _ in asked])
            pairs = zip(asked, parts, strict=True)
            roots.append(torch.cat([many.root(name, at - first) for (name, _, first), at in pairs]))
        many.end_step(stands=True)
        if step == 1:
            before = many.state()
            many.observe_together(many.gradients(77, 3))
            many.end_step(stands=False)
            assert all(torch.equal(tensor, before[key]) for key, tensor in many.state().items())
            many.load_state_dict(copy.deepcopy(many.state_dict()))
            for one in many.preconditioners.values():  # memory of its own, as another would have
                for tensor in one.tensors.values():
                    tensor.data = tensor.data.clone()
    return roots, many.state()


def assert_equal(one, other, rtol=0.0):
    for a, b in zip(one[0], other[0], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 1000)
    for key, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][key], rtol=rtol, atol=rtol / 1000)


@pytest.fixture(params=["host", "device", "reference"])
def side(request, monkeypatch):
    if request.param != "host":
        module = {"device": device, "reference": reference}[request.param]
        monkeypatch.setattr(choice, "_module", lambda *_: module)
        monkeypatch.setattr(device, "sqrt_", host.sqrt_)  # CUDA's are IEEE's, as the host's
        request.getfixturevalue("emulated")()
    return request.param


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), [*KINDS][:4]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_together_are_as_one_after_another(kinds, dtype, side):
    if side == "device" and dtype == torch.float64:
        pytest.skip("float64 is the reference's")
    together, apart = (trained(Many(kinds, dtype), each) for each in (True, False))
    assert_equal(together, apart)


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_has_the_same_numbers(kind, emulated, monkeypatch):
    on_host = trained(Many([kind]), together=True)
    emulated()
    monkeypatch.setattr(device, "sqrt_", host.sqrt_)
    for module in (device, reference):
        monkeypatch.setattr(choice, "_module", lambda *_, module=module: module)
        assert_equal(trained(Many([kind]), True), on_host, 3e-6 if kind == "factored" else 0.0)


@pytest.mark.parametrize(("kind", "to_feed", "to_ask"),
                         [("full", 2, 1), ("factored", 4, 2), ("cover", 4, 1)])  # fmt: skip
def test_launches_are_as_few_for_many_as_for_few(kind, to_feed, to_ask, emulated, monkeypatch):
    monkeypatch.setattr(choice, "_module", lambda *_: device)
    emulator = emulated()
    for number in (2, 50):
        many = Many([kind], shapes=[(20 + k, 30) for k in range(number)])
        for step in range(3):
            many.observe_together(many.gradients(step))
            many.end_step(stands=True)
        given, asked = many.gradients(9), [(name, 2, 0) for name in many.shapes]
        positions_K = torch.arange(2).repeat(number)
        for most, work in (
            (to_feed, lambda: many.observe_together(given)),  # noqa: B023
            (to_ask, lambda: many.roots_together(asked, positions_K)),  # noqa: B023
        ):
            before = sum(emulator.launches.values())
            with Operations() as operations:
                work()
            ours = sum(emulator.launches.values()) - before
            torchs = [n for n in operations.names if not n.startswith(("add_", "_local_scalar"))]
            assert ours + len(torchs) <= most, (emulator.launches, torchs)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda g: (torch.randn(4000)[::2], None), "strides"),
        (lambda g: (g.double(), None), "float64"),
        (lambda g: (g, torch.ones(1, dtype=torch.float64)), "scale is torch.float64"),
    ],
)
def test_gradients_that_kernels_cannot_read_are_refused(wrong, complaint):
    many = Many(["full"], shapes=[(40, 50)])
    grad_N, scale = wrong(torch.randn(2000))
    before = many.state()
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        many.observe_together([("full (40, 50)", grad_N, scale, 1)])
    many.end_step(stands=False)
    assert all(torch.equal(tensor, before[key]) for key, tensor in many.state().items())
