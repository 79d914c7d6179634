import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tolerances import assert_close
from tests.unit.workloads.activations import Made
from workloads import softmax
from workloads.softmax import AdaptiveSoftmax, FullSoftmax, SampledSoftmax, make_softmax

V, D = 40, 16


def make(kind, **options):
    return make_softmax(kind, D, V, num_samples=16, cutoffs=(8, 20), **options)


def positions(num=9, dtype=torch.float32):
    hidden = torch.randn(num, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (num,))
    targets[::4] = -100
    return hidden, targets


def log_probabilities(layer, hidden):
    if isinstance(layer, AdaptiveSoftmax):
        return layer.layer.log_prob(hidden)
    if isinstance(layer, FullSoftmax):
        return layer.linear(hidden).log_softmax(1)
    return (hidden @ layer.weight.weight.T + layer.bias.weight[:, 0]).log_softmax(1)


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
def test_in_eval_mode_the_loss_is_that_of_all_words(kind, rows, monkeypatch):
    torch.manual_seed(0)
    if rows:
        monkeypatch.setattr(softmax, "MAX_LOGITS", rows * V)
    layer = make(kind, word_counts=torch.arange(V, 0, -1)).eval()
    hidden, targets = positions()
    is_counted = targets != -100
    logs = log_probabilities(layer, hidden)[is_counted]
    assert_close(layer(hidden, targets), -logs.gather(1, targets[is_counted, None]).mean())


@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
def test_targets_that_do_not_count_leave_loss_and_gradient_alone(kind):
    torch.manual_seed(0)
    layer = make(kind)
    hidden, targets = positions()
    is_counted = targets != -100
    torch.manual_seed(1)
    loss = layer(hidden, targets)
    torch.manual_seed(1)
    assert_close(loss, layer(hidden[is_counted], targets[is_counted]))
    (gradient,) = torch.autograd.grad(loss, [hidden])
    assert not gradient[~is_counted].any() and gradient[is_counted].all(1).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
def test_without_a_target_that_counts_loss_and_gradient_are_zero(kind, training):
    layer = make(kind).train(training)
    hidden = torch.randn(3, D, requires_grad=True)
    loss = layer(hidden, torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
def test_the_bias_starts_at_the_words_frequencies(kind):
    counts = torch.tensor([2**k for k in range(V, 0, -1)])
    counts[-1] = 0  # counts as seen once
    layer = make(kind, word_counts=counts)
    found = log_probabilities(layer, torch.zeros(1, D))[0]
    expected = (counts.clamp(min=1) / counts.clamp(min=1).sum()).log()
    if kind == "adaptive":  # within clusters, all words start alike
        found, expected = (
            torch.cat([x[:8], x[8:20].logsumexp(0, True), x[20:].logsumexp(0, True)])
            for x in (found, expected)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_loss_is_float32_and_near(kind, training):
    torch.manual_seed(0)
    layer = make(kind).train(training)
    hidden, targets = positions()
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inputs = hidden.bfloat16() if enabled else hidden
            losses.append(layer(inputs, targets))
    assert losses[1].dtype == torch.float32
    assert 0 < abs(losses[0] - losses[1]) < 2**-7 * losses[0]
    losses[1].backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["full", "adaptive", "sampled"])
@pytest.mark.parametrize("training", [True, False])
def test_with_16_bit_weights_the_loss_is_float32(kind, training):
    layer = make(kind).bfloat16().train(training)
    hidden, targets = positions(dtype=torch.bfloat16)
    loss = layer(hidden, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and hidden.grad.isfinite().all()


def test_checkpointed_logits_come_in_chunks_and_give_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    hidden, targets = positions(33)
    layer = FullSoftmax(D, V)
    expected = torch.autograd.grad(layer(hidden, targets), [hidden, *layer.parameters()])
    monkeypatch.setattr(softmax, "MAX_LOGITS", 4 * V)
    layer.checkpoint_logits = True
    with Made() as made:
        loss = layer(hidden, targets)
        assert made.kept_bytes(hidden, targets, *layer.parameters()) < 4 * V * 4
        found = torch.autograd.grad(loss, [hidden, *layer.parameters()])
    assert made.largest < 33 * V  # nor are they all there at once in backward
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_shapes_do_not_depend_on_what_is_drawn(kind):
    counts = torch.arange(V, 0, -1)
    with FakeTensorMode():
        layer = make(kind, word_counts=counts)
        hidden, targets = torch.randn(9, D, requires_grad=True), torch.randint(V, (9,))
        for training in (True, False):
            loss = layer.train(training)(hidden, targets)
            assert loss.shape == () and loss.dtype == torch.float32
            loss.backward()
        assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: make_softmax("hierarchical", D, V), "'hierarchical'; allowed: 'full'"),
        (lambda: SampledSoftmax(D, V, 0), "num_samples is 0; allowed: 1 or more"),
        (lambda: AdaptiveSoftmax(D, V, ()), r"cutoffs are \(\) for 40 words"),
        (lambda: AdaptiveSoftmax(D, V, (20, 8)), r"cutoffs are \(20, 8\)"),
        (lambda: AdaptiveSoftmax(D, V, (8, 40)), "from 1 to 39"),
        (lambda: AdaptiveSoftmax(D, V, (8, 20, 30)), r"16 / 4.0\^3, less than 1; give fewer"),
        (lambda: FullSoftmax(D, V, [1, 2]), r"shape \(2,\); allowed: \(40,\)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(build, named):
    with pytest.raises(ValueError, match=named):
        build()
