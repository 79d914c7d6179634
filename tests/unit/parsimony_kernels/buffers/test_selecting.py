"""Taking large entries out in the pass that accumulates: C++ as specified, and the way back."""

import itertools
import math
import struct

import pytest
import torch

from parsimony_kernels.buffers import host as host_buffers
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers import reference as reference_buffers
from parsimony_kernels.buffers.operands import BINS, VELOCITY_KEY, Correction, Pass, Selection
from parsimony_kernels.buffers.ops import read_reports
from parsimony_kernels.step import ops
from tests.unit.parsimony_kernels.buffers.test_buffers import (
    KEY,
    NESTEROV,
    SIZES,
    Case,
    assert_same_bits,
    found_parts,
    numbers,
    run,
    stored,
    threads,  # noqa: F401
)
from tests.unit.parsimony_kernels.cases import CPU, Guarded

SETTINGS = (
    Selection(0.0, 70_001),
    Selection(0.3, 70_001, False, 3, 2),
    Selection(2.5, 70_001, True, 2, 1),
    Selection(1e3, 70_001),
    Selection(math.inf, 1),
)
OLDS = ("float32", "bfloat16", "int8", "none", "in place")


def pair(dtype, n, seed=1):
    return stored(numbers(n, seed), dtype), stored(numbers(n, seed + 2), dtype)


def copy(buffer):
    return buffers.from_tensors(tuple(part.clone() for part in buffers.tensors(buffer)))


def assert_same_buffers(actual, expected):
    for a, b in zip(buffers.tensors(actual), buffers.tensors(expected), strict=True):
        assert_same_bits(a, b)


def give(residual, velocity, selection, grad_N=None, key=KEY, implementation=None):
    with ops.use(implementation or "native"):
        found = buffers.accumulate(
            grad_N, Correction() if grad_N is None else NESTEROV,
            residual=residual, old_residual=residual,
            velocity=velocity, old_velocity=None if grad_N is None else velocity,
            key=key, selection=selection,
        )  # fmt: skip
    return found, read_reports([found])[0]


# ---- one element after another = the reference = C++ ---------------------------------------------


@pytest.mark.parametrize("n", (1, 255, 256, 257, 600))
@pytest.mark.parametrize("threshold", (0.0, 0.5, 4.0, math.inf))
def test_the_reference_does_what_a_loop_does(n, threshold):
    grad, v, u = (numbers(n, seed) for seed in range(3))
    selection = Selection(threshold, n, True, 2, 1)
    listed, bins, new_u, new_v = [], [0] * BINS, [], []
    for i in range(n):
        x = grad[i] * 1.0
        ui = u[i] * NESTEROV.u_beta + x * NESTEROV.u_gain
        vi = v[i] + (ui * NESTEROV.v_from_u + x * NESTEROV.v_gain)
        if i // 256 % 2 == 1:
            bins[struct.unpack("I", struct.pack("f", abs(vi.item())))[0] >> 20] += 1
        is_taken = threshold < math.inf and abs(vi) >= threshold and vi != 0
        if is_taken:
            listed.append((i, vi.item(), ui.item()))
        new_u.append(0.0 if is_taken else ui.item())
        new_v.append(0.0 if is_taken else vi.item())
    found, report = give(v, u, selection, grad, implementation="reference")
    indices, values, velocities = found.entries(report.count)
    assert list(zip(indices.tolist(), values.tolist(), velocities.tolist(), strict=True)) == listed
    assert v.tolist() == new_v and u.tolist() == new_u
    assert report.count == len(listed) and report.histogram.tolist() == bins
    assert report.largest == grad.abs().max().item()


def cases():
    kinds = itertools.product(buffers.DTYPES, OLDS, (None, *buffers.DTYPES), SETTINGS)
    turns = zip(itertools.cycle(SIZES), itertools.cycle((1, 2, 1)), strict=True)
    grads = itertools.cycle((torch.float32, torch.bfloat16, torch.float16, torch.float32))
    return [
        (Case(dtype, old, u, old if u else "none", n, grad, n % 2 == 1, num_threads), selection)
        for (dtype, old, u, selection), (n, num_threads), grad in zip(
            kinds, turns, grads, strict=False
        )
    ]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("case, selection", cases(), ids=str)
def test_selecting_equals_the_reference(case, selection, threads):  # noqa: F811
    threads(case.threads)
    actual = run(case, host_buffers, selection)
    for a, b in zip(actual, run(case, reference_buffers, selection), strict=True):
        assert_same_bits(a, b)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("dtype", buffers.DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("selection", SETTINGS, ids=str)
def test_selecting_from_what_is_stored_equals_the_reference(dtype, n, selection, threads):  # noqa: F811
    results = []
    for implementation, num in ((reference_buffers, 1), (host_buffers, 1), (host_buffers, 2)):
        threads(num)
        guarded = Guarded(CPU)
        residual, velocity = map(guarded.buffer, pair(dtype, n))
        given = (None, Correction(), residual, residual, velocity, None, None, KEY, selection)
        found = implementation.accumulate([Pass(*given)])[0][0]
        guarded.check()
        parts = [part for b in (residual, velocity) for part in buffers.tensors(b)]
        results.append([*found_parts(found), *parts])
    if results[0][0][1] > selection.capacity:  # which are listed is not specified
        results = [[parts[0]] for parts in results]
    for parts in zip(*results, strict=True):
        assert_same_bits(parts[1], parts[0])
        assert_same_bits(parts[2], parts[0])


# ---- the way back --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", buffers.DTYPES)
@pytest.mark.parametrize("n", (1, 257, 4097, 70_001))
@pytest.mark.parametrize("threshold, capacity", ((0.0, 70_001), (1.0, 70_001), (0.1, 100)))
def test_putting_back_leaves_what_a_pass_without_selection_leaves(
    implementation, dtype, n, threshold, capacity
):
    """Also after a second selection, from what is stored, and where there was too little room."""
    residual, velocity = pair(dtype, n)
    expected = copy(residual), copy(velocity)
    grad = numbers(n, 7)
    give(*expected, None, grad, implementation=implementation)
    found, report = give(
        residual, velocity, Selection(threshold, capacity), grad, implementation=implementation
    )
    again, second = give(
        residual, velocity, Selection(threshold / 2, n), implementation=implementation
    )
    assert n == 1 or report.count + second.count > 0
    for each, seen in ((found, report), (again, second)):
        indices, values, velocities = each.entries(seen.count)
        assert (buffers.take(residual, indices) == 0).all()
        assert (buffers.take(velocity, indices) == 0).all()
        buffers.put(residual, indices, values, KEY)
        buffers.put(velocity, indices, velocities, KEY ^ VELOCITY_KEY)
    assert_same_buffers(residual, expected[0])
    assert_same_buffers(velocity, expected[1])


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_was_taken_goes_back_as_it_was_whatever_the_key(dtype):
    for scale in (1e-35, 1.0, 1e30):
        buffer = stored(numbers(4096) * scale, dtype)
        before, everywhere = copy(buffer), torch.arange(4096)
        for key in range(50):
            buffers.put(buffer, everywhere, buffers.take(buffer, everywhere), key)
            assert_same_buffers(buffer, before)


@pytest.mark.parametrize("dtype", buffers.DTYPES)
@pytest.mark.parametrize("num_threads", (1, 2))
def test_what_there_is_no_room_for_is_counted_and_stays(dtype, num_threads, threads):  # noqa: F811
    threads(num_threads)
    residual, velocity = pair(dtype, 70_001)
    before = [buffers.decode(copy(b)) for b in (residual, velocity)]
    found, report = give(residual, velocity, Selection(0.0, 1000))
    indices, values, velocities = found.entries(report.count)
    assert report.count == (before[0] != 0).sum() and 1000 <= len(indices) <= 1000 * num_threads
    for old, new, listed in zip(before, (residual, velocity), (values, velocities), strict=True):
        assert torch.equal(old[indices], listed)
        old[indices] = 0.0
        assert torch.equal(buffers.decode(new), old)


@pytest.mark.parametrize("implementation", ops.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_nan_is_never_taken_and_infinity_only_above_a_finite_threshold(dtype, implementation):
    grad = torch.ones(1000)
    grad[[3, 500, 900]] = torch.tensor([math.inf, math.nan, -math.inf])
    for threshold, expected in ((2.0, [3, 900]), (math.inf, [])):
        residual = stored(torch.zeros(1000), dtype)
        velocity = copy(residual)
        selection = Selection(threshold, 9)
        found, report = give(residual, velocity, selection, grad, implementation=implementation)
        assert found.entries(report.count)[0].tolist() == expected
        assert math.isnan(report.largest)


# ---- the rest ------------------------------------------------------------------------------------


def test_an_empty_tensor_has_an_empty_report():
    found, report = give(torch.zeros(0), None, Selection(0.0, 3))
    assert report.count == 0 and report.largest == 0 and report.histogram.shape == (BINS,)
    assert [x is None or x.numel() for x in found.entries(0)] == [0, 0, True]


def test_reports_are_read_together():
    big, small = numbers(5000), torch.tensor([3.0, -1.0])
    founds = [
        buffers.accumulate(
            x, Correction(), residual=torch.zeros_like(x), old_residual=None, selection=selection
        )
        for x, selection in ((big, Selection(1.0, 5000)), (small, None), (small, Selection(2.0, 2)))
    ]
    reports = read_reports(founds)
    assert [report.count for report in reports] == [(big.abs() >= 1).sum(), 0, 1]
    assert [report.largest for report in reports] == [big.abs().max().item(), 3.0, 3.0]
    assert reports[1].histogram is None and reports[0].histogram.sum() == 5000
    assert read_reports([]) == []
    assert buffers.split_reports([], torch.zeros(0, dtype=torch.int32)) == []


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_adding_makes_room_in_blocks(dtype):
    buffer = stored(numbers(1000), dtype)
    before, indices = buffers.decode(copy(buffer)), torch.tensor([3, 255, 256, 999])
    values = torch.tensor([1e6, -2.0, 0.0, 3e7])
    buffers.add(buffer, indices, values, KEY)
    error = (buffers.decode(buffer) - before.index_add(0, indices, values)).abs()
    for block, largest in enumerate((1e6, 0, 0, 3e7)):
        largest = max(largest, before[256 * block :][:256].abs().max().item())
        assert error[256 * block :][:256].max() <= 1.02 * largest / 127
    assert (buffers.decode(buffer)[512:768] == before[512:768]).all()


def test_what_cannot_be_selected_is_named():
    v = torch.zeros(300)
    for message, make in (
        ("threshold is nan; allowed", lambda: Selection(math.nan, 1)),
        ("threshold is -1", lambda: Selection(-1.0, 1)),
        ("capacity is 0; allowed", lambda: Selection(1.0, 0)),
        ("sample_first is 2; allowed: 0 to sample_every - 1", lambda: Selection(1, 1, True, 2, 2)),
        ("neither a gradient nor a selection", lambda: give(v, None, None)),
        (
            "old_residual is another buffer",
            lambda: buffers.accumulate(
                None, Correction(), residual=v, old_residual=v.clone(), selection=SETTINGS[0]
            ),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- residuals that lag --------------------------------------------------------------------------


def lag(implementation, n, grad_dtype, selection, lagged):
    """Return what a lagging pass leaves, in the gradient's own memory where it can."""
    guarded = Guarded(CPU)
    residual, old_velocity = (guarded.copy(numbers(n, seed)) for seed in (1, 3))
    grad = guarded.copy(numbers(n, 5).clamp(-6e4, 6e4).to(grad_dtype))
    velocity = grad if grad_dtype == torch.float32 else guarded.copy(numbers(n, 7))
    scale = guarded.copy(torch.tensor([0.37]))
    given = (residual, residual, velocity, old_velocity, scale, 0, selection, lagged)
    found = implementation.accumulate([Pass(grad, Correction(0.9, 1, 1, 0), *given, lags=True)])[0][
        0
    ]
    guarded.check()
    return found_parts(found), residual, velocity


@pytest.mark.parametrize("lagged", (True, False))
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("selection", SETTINGS[::2], ids=str)
def test_a_residual_that_lags_has_the_bits_of_one_that_does_not(n, selection, lagged, threads):  # noqa: F811
    for grad_dtype, num in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 1)):
        threads(num)
        given = (n, grad_dtype, selection, lagged)
        found, residual, velocity = lag(host_buffers, *given)
        expected = lag(reference_buffers, *given)
        for a, b in zip((*found, residual, velocity), (*expected[0], *expected[1:]), strict=True):
            assert_same_bits(a, b)
        old_residual, old_velocity = (numbers(n, seed) for seed in (1, 3))
        if lagged:
            old_residual += old_velocity
        assert_same_bits(residual, old_residual)
        whole, u = old_residual.clone(), old_velocity.clone()
        grad, scale = numbers(n, 5).clamp(-6e4, 6e4).to(grad_dtype), torch.tensor([0.37])
        given = Pass(grad, Correction(0.9, 1, 1, 0), whole, old_residual, u, old_velocity, scale, 0,
                     selection)  # fmt: skip
        anew = host_buffers.accumulate([given])[0][0]
        for a, b in zip(found, found_parts(anew), strict=True):
            assert_same_bits(a, b)
        assert_same_bits(velocity, u)
        residual[found[1]] = 0.0
        assert torch.equal(residual + velocity, whole)
        again = Selection(0.01, n)
        results = []
        for implementation in (host_buffers, reference_buffers):
            left, kept = velocity.clone(), residual.clone()
            given = (None, Correction(), kept, kept, left, None, None, 0, again)
            more = implementation.accumulate([Pass(*given, lags=True)])[0][0]
            results.append([*found_parts(more), left])
            assert_same_bits(kept, residual)
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)
        _, indices, values, velocities = found_parts(more)
        assert torch.equal(values, whole[indices]) and torch.equal(velocities, velocity[indices])
        assert (left[indices] == 0).all()
