import pytest
import torch

from dgc.compensate import Compensation
from kernels import buffers


def accumulate(compensation, grad, name="w"):
    """Add a step's gradient; return the residual in full."""
    compensation.accumulate(name, grad)
    compensation.commit()
    return buffers.decode(compensation.residual[name])


def drain(compensation, grad):
    compensation.accumulate("w", grad, is_sent_whole=True)
    whole = compensation.drain("w")
    compensation.commit()
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


def test_masking_zeroes_velocity_where_sent():
    sent = torch.tensor([3, 40])
    for mask_velocity in (True, False):
        compensation = Compensation(0.9, mask_velocity=mask_velocity)
        accumulate(compensation, grads()[0])
        before = compensation.velocity["w"].clone()
        compensation.remove_sent("w", sent, None)
        assert (compensation.residual["w"][sent] == 0).all()
        expected = before.clone()
        if mask_velocity:
            expected[sent] = 0
        assert torch.equal(compensation.velocity["w"], expected)


def test_what_was_sent_and_what_is_left_make_up_what_was_added():
    compensation = Compensation()
    added = sent = torch.zeros(50, dtype=torch.float64)
    for step, g in enumerate(grads(20)):
        added = added + g
        residual = accumulate(compensation, g)
        indices = torch.tensor([step, step + 20])
        values = residual[indices].half().float()  # a coding that loses something
        compensation.remove_sent("w", indices, residual[indices] - values)
        sent = sent.index_add(0, indices, values.double())
    torch.testing.assert_close(sent + compensation.residual["w"], added, atol=1e-5, rtol=0)


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
    other.load_state_dict(one.state_dict(), {"w": torch.device("cpu")}, {"w": 50})
    g = grads(6)[-1]
    assert torch.equal(accumulate(one, g), accumulate(other, g))
