import pytest
import torch

from dgc.worker.elements import TensorSpec
from dgc.worker.residual import Compensation
from dgc.worker.taken import Taken
from parsimony_kernels.buffers import ops as buffers
from parsimony_kernels.buffers.operands import Selection
from parsimony_kernels.buffers.ops import read_reports


def accumulate(compensation, grad, name="w", indices=None):
    """Add a step's gradient and take some entries out; return the residual in full."""
    compensation.accumulate(name, grad)
    if indices is not None:
        compensation.take_exactly(name, indices)
    compensation.end_step(stands=True)
    return buffers.decode(compensation.residual[name])


def drain(compensation, grad):
    compensation.accumulate("w", grad, is_sent_whole=True)
    whole = compensation.drain("w")
    compensation.end_step(stands=True)
    return whole


def grads(num_steps=4, size=50):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for _ in range(num_steps)]


def test_plain_momentum_correction_follows_the_papers_recurrence():
    compensation = Compensation(momentum=0.9)
    u = v = torch.zeros(50)
    for g in grads():
        u = 0.9 * u + g
        v = v + u
        torch.testing.assert_close(accumulate(compensation, g), v)


def test_nesterov_correction_follows_its_recurrence():
    compensation = Compensation(momentum=0.9, nesterov=True)
    u = v = torch.zeros(50)
    for g in grads():
        u = 0.9 * (u + g)
        v = v + u + g
        torch.testing.assert_close(accumulate(compensation, g), v)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sending_all_each_step_is_momentum_sgd(nesterov):
    ours, theirs = torch.zeros(50), torch.zeros(50, requires_grad=True)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov)
    compensation = Compensation(0.9, nesterov)
    for g in grads():
        ours = ours - 0.1 * drain(compensation, g)
        theirs.grad = g
        sgd.step()
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("nesterov", [False, True])
def test_several_gradients_of_a_step_count_as_their_sum(nesterov):
    apart, joined = (Compensation(0.9, nesterov) for _ in range(2))
    for g in grads():
        apart.accumulate("w", 0.25 * g)
        whole = accumulate(joined, g)
        torch.testing.assert_close(accumulate(apart, 0.75 * g), whole)


def test_masking_zeroes_velocity_where_sent():
    sent = torch.tensor([3, 40])
    for mask_velocity in (True, False):
        compensation = Compensation(0.9, mask_velocity=mask_velocity)
        whole = Compensation(0.9)
        accumulate(whole, grads()[0])
        accumulate(compensation, grads()[0], indices=sent)
        assert (compensation.residual["w"][sent] == 0).all()
        expected = whole.velocity["w"].clone()
        if mask_velocity:
            expected[sent] = 0
        assert torch.equal(compensation.velocity["w"], expected)


@pytest.mark.parametrize("mask_velocity", (True, False))
@pytest.mark.parametrize("momentum", (0.0, 0.9))
@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_what_is_taken_and_put_back_was_never_taken(dtype, momentum, mask_velocity):
    """In a step of three micro-batches, by a pass with the last, by one of its own, by index."""
    one, other = (Compensation(momentum, True, mask_velocity, dtype, dtype, seed=3) for _ in "12")
    for number, g in enumerate(grads(3, 3000)):
        selection = Selection(3.0, 3000) if number == 2 else None
        one.accumulate("w", g)
        found = other.accumulate("w", g, selection=selection)
    taken = [found.entries(read_reports([found])[0].count)]
    again = other.select_again("w", Selection(2.0, 3000))
    taken.append(again.entries(read_reports([again])[0].count))
    left = buffers.decode(other.residual["w"]).nonzero().view(-1)[:5]
    exactly = other.take_exactly("w", left)
    taken.append((exactly.indices_K, exactly.values_K, exactly.velocities_K))
    for part in taken:
        assert part[0].numel() > 0 and (buffers.take(other.residual["w"], part[0]) == 0).all()
        assert (part[2] is not None) == (mask_velocity and momentum > 0)
    other.keep_lost("w", taken[0][0], taken[0][1] / 100)
    for part in taken:
        other.put_back("w", Taken(*part))
    for kind in ("residual", "velocity"):
        for name, buffer in getattr(one, kind).items():
            pairs = zip(
                buffers.tensors(buffer), buffers.tensors(getattr(other, kind)[name]), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", buffers.DTYPES)
def test_a_step_that_took_entries_is_undone_to_the_bit(dtype):
    compensation = Compensation(0.9, residual_dtype=dtype, velocity_dtype=dtype)
    first, second = grads(2, 3000)
    before = accumulate(compensation, first).clone()
    velocity = buffers.decode(compensation.velocity["w"]).clone()
    compensation.accumulate("w", second, selection=Selection(1.0, 3000))
    compensation.select_again("w", Selection(0.5, 3000))
    compensation.end_step(stands=False)
    assert torch.equal(buffers.decode(compensation.residual["w"]), before)
    assert torch.equal(buffers.decode(compensation.velocity["w"]), velocity)


def test_velocities_rest_while_momentum_is_0():
    compensation = Compensation(momentum=0.9)
    compensation.accumulate("w", torch.randn(1000), selection=Selection(9.0, 1000))
    compensation.end_step(stands=True)
    compensation.momentum = 0.0
    before = compensation.velocity["w"].clone()
    compensation.accumulate("w", torch.randn(1000), selection=Selection(9.0, 1000))
    compensation.select_again("w", Selection(1.0, 1000))
    compensation.take_exactly("w", torch.arange(50))
    assert torch.equal(compensation.velocity["w"], before)


def test_entries_move_only_within_a_step():
    compensation, some = Compensation(), torch.tensor([1])
    accumulate(compensation, grads()[0])
    for move in (
        lambda: compensation.take_exactly("w", some),
        lambda: compensation.put_back("w", Taken(some, torch.ones(1), None)),
        lambda: compensation.select_again("w", Selection(1.0, 1)),
    ):
        with pytest.raises(ValueError, match="w has no gradient in this step"):
            move()


def test_what_was_sent_and_what_is_left_make_up_what_was_added():
    compensation = Compensation()
    added = sent = torch.zeros(50, dtype=torch.float64)
    for step, g in enumerate(grads(20)):
        added = added + g
        compensation.accumulate("w", g)
        taken = compensation.take_exactly("w", torch.tensor([step, step + 20]))
        values = taken.values_K.half().float()  # a coding that loses something
        compensation.keep_lost("w", taken.indices_K, taken.values_K - values)
        if step % 3 == 0:  # and what is to be sent another time
            compensation.add("w", taken.indices_K, values)
        else:
            sent = sent.index_add(0, taken.indices_K, values.double())
        compensation.end_step(stands=True)
    torch.testing.assert_close(sent + compensation.residual["w"], added, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_rounding_is_drawn_anew_in_each_step_and_on_each_rank(dtype):
    (grad,) = grads(num_steps=1, size=1000)
    ranks = [Compensation(residual_dtype=dtype, seed=rank) for rank in range(2)]
    first, other_ranks = (accumulate(rank, grad) for rank in ranks)
    del ranks[0].residual["w"]  # the next step rounds the same values
    second = accumulate(ranks[0], grad)
    assert not torch.equal(first, other_ranks) and not torch.equal(first, second)


def test_a_tensor_that_is_sent_whole_keeps_no_residual():
    compensation = Compensation(0.9)
    for g in grads():
        drain(compensation, g)
    assert not compensation.residual
    assert list(compensation.velocity) == ["w"]


def test_going_dense_sends_the_residual_too():
    compensation = Compensation()
    first, second, *_ = grads()
    accumulate(compensation, first)
    torch.testing.assert_close(drain(compensation, second), first + second)
    assert "w" not in compensation.residual


def test_state_is_restored_to_the_bit():
    one = Compensation(0.9)
    for g in grads():
        accumulate(one, g)
    other = Compensation(0.9)
    spec = TensorSpec("w", 50, torch.device("cpu"), compressible=True)
    other.load_state_dict(one.state_dict(), {"w": spec})
    g = grads(6)[-1]
    assert torch.equal(accumulate(one, g), accumulate(other, g))
