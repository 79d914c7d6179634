"""Passes over many tensors, and values put into many buffers, at once: as for one after another."""

import copy
import random

import pytest
import torch

from parsimony_kernels.buffers import device as device_buffers
from parsimony_kernels.buffers import host as host_buffers
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers import reference as reference_buffers
from parsimony_kernels.buffers.operands import BLOCK, Correction, Put, Selection
from parsimony_kernels.step import ops as step_ops
from tests.unit.parsimony_kernels.cases import CPU

SIZES = (1, 255, BLOCK, 257, 5000, 70_001)
GRADS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["host, 1 thread", "host, 2 threads", "device"])
def module(request, emulated):
    if request.param == "device":
        request.getfixturevalue("launches").append(emulated())
        yield device_buffers
        return
    before = torch.get_num_threads()
    torch.set_num_threads(int(request.param[6]))
    yield host_buffers
    torch.set_num_threads(before)


@pytest.fixture
def launches():
    return []


def passes(number, seed):
    """Return passes of all kinds, over tensors that begin anywhere in memory."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    first, made = 0, []
    for _ in range(number):
        n = draw.choice(SIZES)
        odd = draw.choice((0, 1))

        def numbers(dtype=torch.float32):
            return torch.randn(n + odd, generator=generator)[odd:].to(dtype)  # noqa: B023

        def stored(dtype):
            buffer = buffers.empty(n, dtype, CPU)  # noqa: B023
            buffers.accumulate(numbers(), Correction(), residual=buffer, old_residual=None)
            return buffer

        selection = Selection(draw.choice((0.0, 1.5, 3.0)), draw.choice((1, 40, n)),
                              sample_every=2, sample_first=1)  # fmt: skip
        scale = draw.choice((None, torch.tensor([0.37])))
        grad = numbers(draw.choice(GRADS))
        if draw.random() < 0.3:
            made.append(buffers.lagging_pass_of(
                grad, 0.9, selection, residual=numbers(), velocity=numbers(),
                old_velocity=numbers(), is_lagging=draw.random() < 0.5, scale=scale, first=first,
            ))  # fmt: skip
        else:
            dtype, old = draw.choice(buffers.DTYPES), draw.choice(buffers.DTYPES)
            residual, has_velocity = stored(dtype), draw.random() < 0.5
            velocity = stored(dtype) if has_velocity else None
            made.append(buffers.pass_of(
                grad, Correction(0.9, 1, 1, 0) if has_velocity else Correction(),
                residual=residual, old_residual=draw.choice((residual, None, stored(old))),
                velocity=velocity, old_velocity=velocity, scale=scale, key=draw.getrandbits(50),
                selection=draw.choice((None, selection)), first=first,
            ))  # fmt: skip
        first += n
    return made


def test_passes_together_do_what_each_does(module, launches):
    ours, expected = passes(60, 1), passes(60, 1)
    found, report = module.accumulate(ours)
    apart = [reference_buffers.accumulate([each])[0][0] for each in expected]
    assert torch.equal(report, torch.cat([each.report for each in apart]))
    for given, spec, mine, other in zip(ours, expected, found, apart, strict=True):
        count = int(other.report[1])
        if given.selection is not None and count > given.selection.capacity:
            assert given.selection.capacity <= mine.entries(count)[0].numel() <= count
            continue  # which of them are listed is not told
        for a, b in zip(mine.entries(count), other.entries(count), strict=True):
            assert (a is b is None) or torch.equal(a, b)
        for a, b in zip(given[2:6], spec[2:6], strict=True):
            assert a is b is None or all(map(torch.equal, buffers.tensors(a), buffers.tensors(b)))
    for emulator in launches:
        assert set(emulator.launches.values()) == {1}, emulator.launches


@pytest.mark.parametrize("turns", [(0, 1, 1), (3, 0, 900, 2), (5000, 1, 1, 0, 70, 1055), (10**6,)])
def test_thread_blocks_are_shared_so_that_none_has_more_to_do_than_in_one_tensor(turns):
    found = device_buffers.shares(turns)
    most = device_buffers.MAX_BLOCKS
    assert sum(found) <= most + len(turns)
    longest = -(-sum(turns) // most)
    for num_blocks, of_tensor in zip(found, turns, strict=True):
        assert (num_blocks > 0) == (of_tensor > 0) and num_blocks <= of_tensor
        assert of_tensor == 0 or -(-of_tensor // num_blocks) <= longest


@pytest.mark.parametrize("name", ["host", "reference", "device"])
def test_an_empty_tensor_lists_nothing_in_any_implementation(emulated, name):
    emulated()
    modules = {"host": host_buffers, "reference": reference_buffers, "device": device_buffers}
    selection, given = Selection(0.0, 9), []
    for n, first in ((0, 0), (600, 0), (0, 600), (2, 600)):
        grad, residual, velocity = torch.full((n,), 2.0), torch.zeros(n), torch.zeros(n)
        given.append(buffers.pass_of(
            grad, Correction(0.9, 1, 1, 0), residual=residual, old_residual=None, first=first,
            velocity=velocity, old_velocity=None, selection=selection,
        ))  # fmt: skip
    found, report = modules[name].accumulate(given)
    parts = [each.entries(int(each.report[1])) for each in found]
    assert [each.report[1] for each in found] == [0, 600, 0, 2]
    assert [indices.numel() for indices, *_ in parts] == [0, 9, 0, 2]
    assert parts[3][0].tolist() == [600, 601] and (parts[1][2] == 2).all()
    assert report.numel() == sum(each.report.numel() for each in found)


def test_an_empty_tensor_among_others_finds_nothing():
    empty, one = torch.zeros(0), torch.ones(3)
    selection = Selection(0.5, 3)
    found, report = buffers.accumulate_together([
        buffers.pass_of(g, Correction(), residual=torch.zeros_like(g), old_residual=None,
                        selection=selection, first=7) for g in (empty, one, empty)
    ])  # fmt: skip
    assert [each.indices.tolist() for each in found] == [[], [7, 8, 9], []]
    assert report.numel() == sum(each.report.numel() for each in found)


def test_passes_of_two_dtypes_of_arithmetic_are_refused():
    given = [
        buffers.pass_of(g, Correction(), residual=torch.zeros_like(g), old_residual=None)
        for g in (torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    ]
    with pytest.raises(ValueError, match="passes of 2 devices or dtypes; allowed: 1"):
        buffers.accumulate_together(given)


@pytest.mark.parametrize("zeros", [False, True])
def test_values_are_put_into_many_buffers(module, launches, zeros):
    generator = torch.Generator().manual_seed(3)
    puts, positions, first = [], [], 0
    for number in range(30):
        n, dtype = SIZES[number % len(SIZES)], buffers.DTYPES[number % 3]
        buffer = buffers.empty(n, dtype, CPU)
        start = torch.randn(n, generator=generator)
        buffers.accumulate(start, Correction(), residual=buffer, old_residual=None, key=number)
        count = 0 if number == 7 else max(1, n // 3)
        positions.append(first + torch.randperm(n, generator=generator)[:count])
        puts.append(Put(buffer, count, first, 2**40 + number))
        first += n
    positions_K = torch.cat(positions)
    values_K = torch.randn(len(positions_K), generator=generator) * 0.7
    values_K[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-38, 3.3e38, 0.5])
    ours = [put._replace(buffer=copy.deepcopy(put.buffer)) for put in puts]
    for each, into in ((reference_buffers, puts), (module, ours)):
        each.put(into, positions_K, None if zeros else values_K)
    for mine, other in zip(ours, puts, strict=True):
        a, b = buffers.tensors(mine.buffer), buffers.tensors(other.buffer)
        assert all(map(torch.equal, a, b)), mine.key
    for emulator in launches:
        assert emulator.launches == {"put_values": 1}


def test_nothing_is_put_where_one_index_is_outside_of_its_buffer():
    one, two = torch.zeros(300), buffers.empty(300, "int8", CPU)
    two.codes.zero_()
    for wrong in ([-1, 2], [2, 300]):
        positions_K = torch.tensor([5, *(300 + i for i in wrong)])
        with pytest.raises(IndexError, match=rf"{min(wrong)}\.\.{max(wrong)}; allowed: 0\.\.299"):
            buffers.put_together([Put(one, 1, 0, 0), Put(two, 2, 300, 0)], positions_K, None)
        with pytest.raises(IndexError, match=r"allowed: 0\.\.299"):
            buffers.put_together(
                [Put(one, 1, 0, 0), Put(one, 2, 300, 0)], positions_K, torch.ones(3)
            )
        assert not one.any()


def test_the_largest_gradient_is_seen_though_the_residual_takes_its_memory():
    for dtype in (torch.float32, torch.float64):
        residual, grad = torch.full((300,), 7, dtype=dtype), torch.ones(300, dtype=dtype)
        with step_ops.use("reference"):
            found = buffers.accumulate(grad, Correction(), residual=grad, old_residual=residual)
        assert found.largest == 1
