"""Optimizers on an emulated GPU: the numbers of those on a CPU, in few launches."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parsimony_kernels.runtime import choice
from parsimony_kernels.runtime.checks import trusted_positions
from parsimony_kernels.step import arguments, device, feeding
from tests.tolerances import assert_close
from tests.unit.optim.helpers import EVERY_OPTIMIZER, gradients, parameter, row_sparse

SHAPES = [(40,), (), (12, 20), (30, 1), (60, 41), (3, 200)]
DTYPES = [torch.float32, torch.bfloat16]
MOST_LAUNCHES = 12  # of a step
FREE = (
    "empty",
    "slice",
    "lift",
    "view",
    "detach",
    "select",
    "indices",
    "values",
    "sparse_dim",
    "is_coalesced",
)


class Operations(TorchDispatchMode):
    """Counts torch's operations that are launches on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().removeprefix("aten::")
        if not name.startswith((*FREE, "profiler")):
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def arrive(parameters, step):
    """Give each parameter a gradient, dense, of rows or of elements, by the step's number."""
    elements = {}
    for number, p in enumerate(parameters):
        (grad,) = gradients(1, *p.shape, dtype=p.dtype, seed=step + number)
        p.grad = grad
        if step % 3 == 1 and p.dim() == 2:
            rows = range(0, len(p), 2)
            p.grad = row_sparse(rows, grad[::2], p.shape).coalesce()
        elif step % 3 == 2:
            p.grad = None
            indices = torch.arange(0, p.numel(), 3)
            elements[p] = indices, grad.flatten()[indices].float()
    return elements


def made(copies):
    return [parameter(*shape, dtype=dtype, seed=k) for _ in range(copies)
            for dtype in DTYPES for k, shape in enumerate(SHAPES)]  # fmt: skip


def trained(name, parameters, num_steps=7):
    optimizer = EVERY_OPTIMIZER[name](parameters, weight_decay=0.01)
    for step in range(num_steps):
        optimizer.step(elements=arrive(parameters, step))
    return optimizer


@pytest.fixture
def on_a_gpu(emulated, monkeypatch):
    """Make CPU tensors' steps those of an emulated GPU; returns the emulator."""
    monkeypatch.setattr(choice, "_module", lambda chosen, folder, device_type: device)
    return emulated()


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_steps_on_a_gpu_have_the_numbers_of_those_on_a_cpu(name, request, monkeypatch):
    monkeypatch.setattr(feeding, "MOST_WAITING_BYTES", 2**14)  # several groups of sketches
    expected = made(1)
    expected_state = trained(name, expected).state_dict()["state"]
    request.getfixturevalue("on_a_gpu")
    actual = made(1)
    state = trained(name, actual).state_dict()["state"]
    same = assert_close if "actored" in name else torch.testing.assert_close
    exactly = {} if "actored" in name else {"rtol": 0, "atol": 0}
    for p, q in zip(actual, expected, strict=True):
        same(p.detach(), q.detach(), **exactly)
    for number, tensors in expected_state.items():
        for key, tensor in tensors.items():
            same(state[number][key], tensor, **exactly)


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_a_step_is_a_dozen_launches_however_many_tensors(name, on_a_gpu):
    counts = []
    for copies in (1, 3):
        parameters = made(copies)
        optimizer = trained(name, parameters, num_steps=3)
        for step in range(3, 6):
            elements = arrive(parameters, step)
            before = dict(on_a_gpu.launches)
            with Operations() as operations, trusted_positions():
                optimizer.step(elements=elements)
            launches = [kernel for kernel, count in on_a_gpu.launches.items()
                        for _ in range(count - before.get(kernel, 0))]  # fmt: skip
            counts.append(len(launches) + len(operations.names))
            assert counts[-1] <= MOST_LAUNCHES, (step, launches, operations.names)
    assert counts[:3] == counts[3:]


def shifted(tensor, shift):
    """Return a copy that begins `shift` elements after a boundary of memory."""
    memory = tensor.new_empty(tensor.numel() + 64)
    begin = -memory.data_ptr() // tensor.element_size() % 16 + shift
    return memory[begin : begin + tensor.numel()].view_as(tensor).copy_(tensor)


def stepped(name, shift, change, num_steps=6):
    """Dense steps, whole tiles among them; in some, gradients or the rate are other ones."""
    parameters = [
        torch.nn.Parameter(shifted(parameter(*shape, dtype=dtype, seed=k).detach(), shift))
        for dtype in DTYPES
        for k, shape in enumerate([(70, 256), (33, 128), (9,)])
    ]
    optimizer = EVERY_OPTIMIZER[name](parameters)
    for step in range(num_steps):
        for p in parameters:
            (grad,) = gradients(1, *p.shape, dtype=p.dtype, seed=step)
            p.grad = shifted(grad, step % 2 * shift)
        change(step, parameters, optimizer)
        optimizer.step()
    return parameters


def change_what_plans_keep(step, parameters, optimizer):
    if step == 3:
        optimizer.param_groups[0]["lr"] /= 2
    if step == 4:
        parameters[1].grad = None  # other tensors than in the steps before


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("name", ["SM3", "SM3 with momentum and beta", "FactoredAdam", "Adam"])
def test_steps_that_are_repeated_and_memory_on_and_off_boundaries(
    name, shift, request, monkeypatch
):
    monkeypatch.setattr(arguments, "WANTED_TILES", 6)  # so that threads take several rows
    expected = stepped(name, 0, change_what_plans_keep)
    request.getfixturevalue("on_a_gpu")
    for p, q in zip(stepped(name, shift, change_what_plans_keep), expected, strict=True):
        if name == "FactoredAdam":
            assert_close(p.detach(), q.detach())
        else:
            assert torch.equal(p, q)


def test_no_gradient_is_kept_after_its_step(on_a_gpu):
    parameters = made(1)
    optimizer = trained("SM3", parameters, num_steps=1)
    arrive(parameters, 0)
    optimizer.step()
    kept = weakref.ref(parameters[0].grad)
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert kept() is None
    state = [weakref.ref(tensor) for p in parameters for tensor in optimizer.state[p].values()]
    gc.disable()  # which a GPU's memory does not wait for
    try:
        del optimizer
        assert state and not any(each() is not None for each in state)
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [[3, 2], [2, 2], [-1, 2], [2, 240]])
def test_wrong_positions_are_refused_before_any_parameter_is_stepped(wrong, on_a_gpu):
    parameters = [parameter(12, 20), parameter(12, 20)]
    optimizer = trained("Adam", parameters, num_steps=3)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = None
    given = {p: (torch.tensor(at), torch.ones(2))
             for p, at in zip(parameters, ([1, 5], wrong), strict=True)}  # fmt: skip
    with pytest.raises(ValueError, match="indices (lie in|are not ascending)"):
        optimizer.step(elements=given)
    parameters[1].grad = torch.sparse_coo_tensor(
        torch.tensor([wrong]) % 240, torch.ones(2, 20), (12, 20),
        is_coalesced=True, check_invariants=False,
    )  # fmt: skip
    if wrong != [-1, 2]:
        with pytest.raises(ValueError, match="rows (lie in|are not ascending)"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
