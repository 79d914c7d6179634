"""Residuals that lag behind their velocity are to the bit what they would be, in less memory."""

import pytest
import torch

from dgc.worker.residual import Compensation
from dgc.worker.storage import KINDS
from dgc.worker.taken import Taken
from parsimony_kernels.buffers.operands import Selection
from parsimony_kernels.buffers.ops import read_reports

NUMEL = 3000


def gradients(num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(NUMEL, generator=generator) for _ in range(num_steps)]


def select(compensation, grad_N, threshold=2.5, capacity=NUMEL, **settings):
    selection = Selection(threshold, capacity)
    found = compensation.accumulate("w", grad_N.clone(), selection=selection, **settings)
    return Taken(*found.entries(read_reports([found])[0].count))


def send(compensation, grad_N):
    return [select(compensation, grad_N)]


def send_rounded(compensation, grad_N):
    taken = select(compensation, grad_N)
    lost_K = taken.values_K - taken.values_K.bfloat16().float()
    compensation.keep_lost("w", taken.indices_K, lost_K)
    return [taken]


def send_half(compensation, grad_N):
    taken = select(compensation, grad_N)
    is_back_K = taken.indices_K % 2 == 0
    compensation.keep_lost("w", taken.indices_K, taken.values_K / 100)
    compensation.put_back("w", taken.where(is_back_K))
    return [taken.where(~is_back_K)]


def send_what_there_is_room_for(compensation, grad_N):
    taken = select(compensation, grad_N, 1.0, capacity=100)  # on one thread: the first ones
    return [taken]


def look_again(compensation, threshold=2.0):
    found = compensation.select_again("w", Selection(threshold, NUMEL))
    return Taken(*found.entries(read_reports([found])[0].count))


def send_in_three_passes(compensation, grad_N):
    taken = [select(compensation, grad_N)]
    compensation.keep_lost("w", taken[0].indices_K, taken[0].values_K / 100)
    taken += [look_again(compensation), look_again(compensation, 1.5)]
    compensation.keep_lost("w", taken[1].indices_K, taken[1].values_K / 100)
    return taken


def put_back_after_two_passes(compensation, grad_N):
    taken = [select(compensation, grad_N), look_again(compensation)]
    for part in taken:
        compensation.put_back("w", part.where(part.indices_K % 2 == 0))
    return taken


def send_more(compensation, grad_N):
    taken = select(compensation, grad_N)
    more = look_again(compensation)
    exactly = compensation.take_exactly("w", torch.arange(0, NUMEL, 7))
    compensation.put_back("w", taken)
    return [taken, more, exactly]


def keep_for_later(compensation, grad_N):
    taken = select(compensation, grad_N)
    compensation.add("w", taken.indices_K, taken.values_K / 2)
    return [taken]


def send_micro_batches(compensation, grad_N):
    compensation.accumulate("w", grad_N / 2)
    return [select(compensation, grad_N / 2)]


def rest(compensation, grad_N):
    return []


def without_momentum(compensation, grad_N):
    compensation.momentum = 0.0
    taken = select(compensation, grad_N)
    return [taken]


def start_anew(compensation, grad_N):
    compensation.start_velocity("w", grad_N)
    return [select(compensation, grad_N)]


def drain(compensation, grad_N):
    compensation.accumulate("w", grad_N, is_sent_whole=True)
    values_N = compensation.drain("w")
    return [Taken(torch.arange(NUMEL), values_N, None)]


WAYS = (
    *(send, send_rounded, send_half, send_what_there_is_room_for, send_more, keep_for_later),
    *(send_in_three_passes, put_back_after_two_passes),
    *(send_micro_batches, rest, without_momentum, start_anew, drain),
)


def bits(compensation):
    state = compensation.state_dict()
    return {kind: {n: t.clone() for n, t in state[kind].items()} for kind in KINDS}


def assert_same_bits(one, other):
    for kind in KINDS:
        assert one[kind].keys() == other[kind].keys()
        for name, tensor in one[kind].items():
            assert torch.equal(tensor.view(torch.int32), other[kind][name].view(torch.int32)), kind


@pytest.mark.parametrize("stands", (True, False))
@pytest.mark.parametrize("way", WAYS)
def test_a_lagging_residual_is_to_the_bit_what_one_that_is_written_anew_is(way, stands):
    """A step of each kind between steps that lag. Whose residual is read is written anew."""
    lagging, anew = Compensation(0.9), Compensation(0.9)
    ways = [send, send, send_rounded, way, send, way, rest, send, way]
    for now, grad_N in zip(ways, gradients(len(ways)), strict=True):
        ends = stands or now is not way
        dict(anew.residual.items())
        one, other = now(lagging, grad_N), now(anew, grad_N)
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine.indices_K, theirs.indices_K)
            assert torch.equal(mine.values_K, theirs.values_K)
        for compensation in (lagging, anew):
            compensation.end_step(ends)
            compensation.momentum = 0.9
    assert_same_bits(bits(lagging), bits(anew))


@pytest.mark.parametrize("undo", (lambda c: c.end_step(False), lambda c: c.drop("w")))
@pytest.mark.parametrize(
    "way", (send, send_half, send_in_three_passes, put_back_after_two_passes, keep_for_later)
)
def test_a_step_that_does_not_stand_leaves_no_trace(way, undo):
    undone, never = Compensation(0.9), Compensation(0.9)
    first, second, bad, last = gradients(4)
    for compensation in (undone, never):
        for grad_N in (first, second):
            send(compensation, grad_N)
            compensation.end_step(True)
    bad[5] = float("nan")
    way(undone, bad)
    undo(undone)
    undone.end_step(False)
    for compensation in (undone, never):
        send(compensation, last)
        compensation.end_step(True)
    assert_same_bits(bits(undone), bits(never))


def test_a_step_needs_just_gradient_velocity_and_residual():
    compensation = Compensation(0.9)
    send(compensation, gradients(1)[0])
    compensation.end_step(True)
    residual = compensation._kept["residual"]["w"]
    for grad_N in gradients(3, seed=1):
        selection = Selection(2.5, NUMEL)
        compensation.accumulate("w", grad_N, selection=selection, may_keep=True)
        look_again(compensation)
        compensation.end_step(True)
        assert compensation.velocity["w"].data_ptr() == grad_N.data_ptr()
        assert compensation._kept["residual"]["w"] is residual


def test_what_was_read_is_not_changed_by_later_steps():
    compensation = Compensation(0.9)
    for grad_N in gradients(2):
        send(compensation, grad_N)
        compensation.end_step(True)
    saved, copies = compensation.state_dict(), bits(compensation)
    for grad_N in gradients(2, seed=1):
        send(compensation, grad_N)
        compensation.end_step(True)
    assert_same_bits(saved, copies)
