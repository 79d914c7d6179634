"""Residual and velocity in 4, 2 and 1 bytes: C++ as specified, and a rounding that is fair."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from parsimony_kernels.buffers import host as host_buffers
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers import reference as reference_buffers
from parsimony_kernels.buffers.operands import (
    BLOCK,
    MIN_SCALE,
    Blocks,
    Buffer,
    Correction,
    Found,
    Pass,
    Selection,
)
from parsimony_kernels.buffers.ops import read_reports
from parsimony_kernels.step import ops
from tests.unit.parsimony_kernels.cases import CPU, Guarded

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 31, 255, 256, 257, 1000, 4097, 70001)
OLD = (*buffers.DTYPES, "none", "in place")
KEY = -0x123456789ABCDEF  # a 64-bit key whose halves both count
NESTEROV = Correction(u_beta=0.9, u_gain=1.1, v_from_u=0.7, v_gain=0.3)
FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Case:
    residual: str
    old_residual: str
    velocity: str | None
    old_velocity: str
    n: int
    grad: torch.dtype
    scaled: bool
    threads: int

    def __str__(self) -> str:
        kept = f"{self.old_residual} to {self.residual}-{self.old_velocity} to {self.velocity}"
        dtype = str(self.grad).removeprefix("torch.")
        return f"{kept}-{self.n}-{dtype}-scaled {self.scaled}-threads {self.threads}"


def storage_cases() -> list[Case]:
    """Every way to store old and new residual and velocity; the rest takes turns."""
    velocities = [(None, "none"), *itertools.product(buffers.DTYPES, OLD)]
    kinds = itertools.product(itertools.product(buffers.DTYPES, OLD), velocities)
    turns = zip(*map(itertools.cycle, (SIZES, GRAD_DTYPES, (True, False, False), (1, 1, 1, 1, 2))),
                strict=True)  # fmt: skip
    return [Case(*residual, *velocity, *turn)
            for (residual, velocity), turn in zip(kinds, turns, strict=False)]  # fmt: skip


def size_cases() -> list[Case]:
    kinds = itertools.product(buffers.DTYPES, SIZES, GRAD_DTYPES, (True, False), (1, 2))
    return [Case(dtype, "in place", dtype, "in place", *rest) for dtype, *rest in kinds]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- making and comparing ------------------------------------------------------------------------


def numbers(n: int, seed: int = 0) -> Tensor:
    """Numbers of many sizes, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 10 ** torch.randn(n, generator=generator)
    values[torch.rand(n, generator=generator) < 0.1] = 0.0
    return values


def stored(values: Tensor, dtype: str, key: int = 0) -> Buffer:
    buffer = buffers.empty(values.numel(), dtype, CPU)
    reference_buffers.accumulate([Pass(values, Correction(), buffer, None, None, None, None, key)])[
        0
    ][0]
    return buffer


def old_and_new(dtype: str | None, old: str, n: int, seed: int) -> tuple[Buffer | None, ...]:
    if dtype is None:
        return None, None
    if old == "in place":
        buffer = stored(numbers(n, seed), dtype)
        return buffer, buffer
    before = None if old == "none" else stored(numbers(n, seed), old)
    return before, stored(numbers(n, seed + 1), dtype)


def run(case: Case, implementation, selection: Selection | None = None) -> tuple[Tensor, ...]:
    """Return all that one accumulation leaves: report, lists, new buffers, old buffers."""
    guarded, kept = Guarded(CPU), []
    for seed, dtype, old in (
        (1, case.residual, case.old_residual),
        (3, case.velocity, case.old_velocity),
    ):
        before, after = old_and_new(dtype, old, case.n, seed)
        after = guarded.buffer(after)
        kept += [after, after if old == "in place" else guarded.buffer(before)]
    grad = guarded.copy(numbers(case.n, 5).clamp(-6e4, 6e4).to(case.grad))
    scale = guarded.copy(torch.tensor([0.37])) if case.scaled else None
    correction = NESTEROV if case.velocity else Correction(v_gain=1.3)
    found = implementation.accumulate([Pass(grad, correction, *kept, scale, KEY, selection)])[0][0]
    guarded.check()
    parts = (part for b in kept if b is not None for part in buffers.tensors(b))
    return *found_parts(found), *parts


def found_parts(found: Found) -> tuple[Tensor, ...]:
    """Return all that is found, on the CPU; absent velocities as none listed."""
    indices, values, velocities = found.entries(read_reports([found])[0].count)
    velocities = values[:0] if velocities is None else velocities
    return tuple(part.cpu() for part in (found.report, indices, values, velocities))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    wrong = (actual != expected).sum()
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), f"{wrong} differ"


# ---- native equals the reference -----------------------------------------------------------------


@pytest.mark.one_in(7)
@pytest.mark.parametrize("case", [*storage_cases(), *size_cases()], ids=str)
def test_accumulate_equals_the_reference(case, threads):
    threads(case.threads)
    actual, expected = run(case, host_buffers), run(case, reference_buffers)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)


def test_an_empty_gradient_is_no_error():
    buffer = buffers.empty(0, "int8", CPU)
    found = buffers.accumulate(torch.zeros(0), Correction(), residual=buffer, old_residual=None)
    assert torch.equal(found.largest, torch.zeros(1))


# ---- the rounding --------------------------------------------------------------------------------


def quantum(values: Tensor, buffer: Buffer) -> Tensor:
    """Return the distance between the two neighbours of each value."""
    if isinstance(buffer, Blocks):
        return buffer.scales.repeat_interleave(BLOCK)[: values.numel()]
    return torch.exp2(values.abs().log2().floor() - 7)  # bfloat16 has 7 bits behind the point


def draw(values: Tensor, dtype: str, key: int) -> Buffer:
    buffer = buffers.empty(values.numel(), dtype, CPU)
    buffers.accumulate(values, Correction(), residual=buffer, old_residual=None, key=key)
    return buffer


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_the_mean_of_many_draws_is_the_value(dtype):
    """A draw's standard deviation is at most half a quantum: 5 of the mean's are allowed."""
    values, num_draws = torch.randn(1000, generator=torch.Generator().manual_seed(0)), 900
    step = quantum(values, draw(values, dtype, 0))
    errors = torch.zeros(1000, dtype=torch.float64)
    for key in range(num_draws):
        error = (buffers.decode(draw(values, dtype, key)) - values) / step
        assert error.abs().max() < 1 + 1e-4  # one of the two neighbours; rounding of the quotient
        errors += error
    means = errors / num_draws
    assert means.abs().max() <= 5 * 0.5 / num_draws**0.5
    assert means.mean().abs() <= 5 * 0.5 / (num_draws * 1000) ** 0.5


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_velocity_and_residual_are_rounded_independently(dtype):
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5
    u, v = (buffers.empty(4096, dtype, CPU) for _ in range(2))
    both = Correction(u_gain=1.0, v_gain=1.0)
    buffers.accumulate(values, both, residual=v, old_residual=None, velocity=u)
    step = quantum(values, u)
    errors = [((buffers.decode(b) - values) / step).double() for b in (u, v)]
    assert (errors[0] * errors[1]).mean().abs() <= 5 * 0.25 / 4096**0.5


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_zeros_stay_exact_zeros(dtype):
    values = numbers(1000)
    values[BLOCK : 2 * BLOCK] = 0.0
    for key in range(20):
        buffer = draw(values, dtype, key)
        assert (buffers.decode(buffer)[values == 0] == 0).all()
        if isinstance(buffer, Blocks):
            assert buffer.scales[1] == torch.tensor(MIN_SCALE)


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_denormal_numbers_stay_finite_and_near(dtype):
    values = numbers(1000) * 1e-40
    decoded = buffers.decode(draw(values, dtype, 0))
    assert decoded.isfinite().all()
    assert (decoded - values).abs().max() <= MIN_SCALE


def test_the_largest_numbers_do_not_become_infinite_in_bfloat16():
    values = torch.tensor([FLOAT_MAX, -FLOAT_MAX]).repeat(50)
    finite = torch.finfo(torch.bfloat16).max
    for key in range(20):
        assert (draw(values, "bfloat16", key).abs() == finite).all()


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", buffers.DTYPES)
@pytest.mark.parametrize("grad", GRAD_DTYPES)
def test_the_maximum_tells_of_what_is_not_finite(dtype, grad, implementation):
    inf, nan = float("inf"), float("nan")
    buffer, velocity = (buffers.empty(1000, dtype, CPU) for _ in "12")
    for bad, expected in (((inf,), inf), ((-inf,), inf), ((nan,), nan), ((inf, -nan, 3.0), nan)):
        x = torch.ones(1000, dtype=grad)
        x[500 : 500 + len(bad)] = torch.tensor(bad)
        with ops.use(implementation):
            found = buffers.accumulate(
                x, NESTEROV, residual=buffer, old_residual=None, velocity=velocity
            )
        largest = found.largest
        torch.testing.assert_close(largest, torch.tensor([expected]), equal_nan=True)


# ---- the whole -----------------------------------------------------------------------------------


def test_nothing_is_lost_in_float32():
    """Small integers, which float32 adds without rounding."""
    generator = torch.Generator().manual_seed(0)
    before, grad = (torch.randint(-99, 99, (4097,), generator=generator).float() for _ in "12")
    residual = before.clone()
    found = buffers.accumulate(grad, Correction(), residual=residual, old_residual=residual)
    assert torch.equal(residual, before + grad)
    assert torch.equal(found.largest, grad.abs().max().view(1))


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_put_and_take_agree_with_decode(dtype):
    buffer = stored(numbers(1000), dtype)
    indices = torch.arange(3, 1000, 7)
    before = buffers.decode(buffer).clone()
    assert torch.equal(buffers.take(buffer, indices), before[indices])
    buffers.put(buffer, indices, None, KEY)
    after = buffers.decode(buffer)
    assert (after[indices] == 0).all()
    before[indices] = 0.0
    assert torch.equal(after, before)
    again = buffers.from_tensors(buffers.tensors(buffer))
    assert torch.equal(buffers.decode(again), after) and buffers.numel(again) == 1000


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_is_put_is_a_neighbour(dtype):
    values = numbers(1000)
    buffer = stored(values, dtype)
    indices = (values != 0).nonzero().view(-1)
    buffers.put(buffer, indices, values[indices], KEY)
    error = (buffers.take(buffer, indices) - values[indices]).abs()
    assert (error <= quantum(values, buffer)[indices] * (1 + 1e-4)).all()


def test_what_does_not_fit_is_named():
    n = 300
    grad, residual, blocks = torch.zeros(n), torch.zeros(n), buffers.empty(n, "int8", CPU)
    for message, changes in (
        ("grad is torch.int32", {"grad_N": grad.int()}),
        ("^residual is torch.float32; allowed: torch.float64", {"grad_N": grad.double()}),
        ("^residual is torch.float64; allowed: torch.float32", {"residual": residual.double()}),
        ("grad has shape", {"grad_N": grad.view(3, 100)}),
        ("grad has strides", {"grad_N": torch.zeros(2 * n)[::2]}),
        ("^residual is torch.float16", {"residual": residual.half()}),
        ("^residual has 299 elements", {"residual": residual[1:].clone()}),
        ("^old_residual has strides", {"old_residual": torch.zeros(2 * n)[::2]}),
        ("^residual.codes is torch.uint8", {"residual": Blocks(residual.byte(), blocks.scales)}),
        ("residual.scales has 1 el", {"residual": Blocks(blocks.codes, blocks.scales[:1])}),
        ("^velocity has 1 elements", {"velocity": residual[:1]}),
        ("old_velocity .* without a velocity", {"old_velocity": residual}),
        ("v_from_u without a velocity", {"correction": Correction(v_from_u=1.0)}),
        ("scale has shape", {"scale": torch.ones(2)}),
        ("scale is torch.float64", {"scale": torch.ones(1, dtype=torch.float64)}),
    ):
        arguments = {"grad_N": grad, "correction": Correction(), "residual": residual}
        arguments |= {"old_residual": None} | changes
        with pytest.raises(ValueError, match=message):
            buffers.accumulate(**arguments)


# ---- float64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8"])
def test_float64_gradients_are_accumulated_in_float64(dtype, implementation):
    """By the definition, whatever the implementation; what is stored in fewer bits from float32."""
    n, momentum = 3 * BLOCK + 5, 0.9  # as a float32 it is 2.4e-8 off
    grads = [numbers(n, seed).double() * (1 + 1e-9) for seed in (1, 2)]
    scale = torch.tensor([1 / 3], dtype=torch.float64)
    before = [buffers.empty(n, dtype, CPU) for _ in range(2)]
    for buffer in before:
        for part in buffers.tensors(buffer):
            part.zero_()
    old_v, old_u = before
    v = u = torch.zeros(n, dtype=torch.float64)
    with ops.use(implementation):
        for grad in grads:
            new_v, new_u = (buffers.empty(n, dtype, CPU) for _ in range(2))
            found = buffers.accumulate(
                grad, Correction(momentum, 1.0, 1.0, 0.0), residual=new_v, old_residual=old_v,
                velocity=new_u, old_velocity=old_u, scale=scale, key=KEY,
                selection=Selection(1.0, n),
            )  # fmt: skip
            u = u * momentum + grad * scale
            v = v + u
            taken = (v.abs() >= 1.0).nonzero().view(-1)
            if dtype == "float64":
                assert torch.equal(found.indices, taken)
                assert_same_bits(found.values, v[taken])
                assert_same_bits(found.velocities, u[taken])
            assert found.values.dtype == torch.float64
            assert read_reports([found])[0].largest == (grad * scale).abs().max().float()
            for buffer, exact in ((new_v, v), (new_u, u)):
                exact[found.indices] = 0.0
                off = (buffers.decode(buffer).double() - exact).abs()
                most = 0.0 if dtype == "float64" else quantum(exact.float(), buffer) * (1 + 1e-4)
                assert (off <= most).all()
            if dtype != "float64":
                break  # what is then added to is what was stored
            buffers.put(new_v, found.indices, found.values, KEY)
            buffers.put(new_u, found.indices, found.velocities, KEY)
            v[found.indices], u[found.indices] = found.values, found.velocities
            assert_same_bits(new_v, v)
            old_v, old_u = new_v, new_u
    assert buffers.take(new_v, taken[:3]).dtype == (
        torch.float64 if dtype == "float64" else torch.float32
    )
