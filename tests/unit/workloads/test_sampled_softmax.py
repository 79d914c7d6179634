"""The sampled softmax: an oracle, exact expectations over all draws, means of many draws."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from dgc import row_sparse_names
from tests.unit.workloads.activations import Made
from workloads.softmax import SampledSoftmax

V, D = 40, 6


def naive_loss(layer, hidden, target, samples, *, corrected=True, once=True, hits=False):
    """Jean et al.'s sum for one position, a word at a time."""
    weights, biases = layer.weight.weight, layer.bias.weight[:, 0]
    log_counts = layer.log_expected_counts(torch.arange(layer.num_words)) * corrected

    def logit(k):
        return hidden @ weights[k] + biases[k] - log_counts[k]

    words = sorted(set(samples.tolist())) if once else samples.tolist()
    others = [logit(k) for k in words if hits or k != target]
    return torch.stack([logit(target), *others]).logsumexp(0) - logit(target)


@pytest.mark.parametrize("num_samples", [1, 2, 31, 32, 33, 1000])
def test_the_sampled_loss_is_the_naive_one(num_samples):
    torch.manual_seed(num_samples)
    layer = SampledSoftmax(D, V, num_samples).double()
    torch.nn.init.normal_(layer.weight.weight)
    torch.nn.init.normal_(layer.bias.weight)
    hidden = torch.randn(32, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (32,))
    targets[::4] = -100
    samples = layer.draw(hidden.device)
    targets[1], targets[2] = samples[0], samples[-1]  # hits at both ends
    found = layer.loss(hidden, targets, samples)
    each = [naive_loss(layer, hidden[i], int(targets[i]), samples)
            for i in range(32) if targets[i] != -100]  # fmt: skip
    expected = torch.stack(each).mean()
    parameters = [hidden, *layer.parameters()]
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(gradient.to_dense(), wanted.to_dense())


def small_layer(num_words=5, num_samples=3):
    layer = SampledSoftmax(1, num_words, num_samples).double()
    layer.weight.weight.data.zero_()
    layer.bias.weight.data.copy_(torch.tensor([[0.3], [-1.0], [0.2], [1.5], [1.0]]))
    return layer


def all_draws(layer):
    """Yield every draw, ascending, and its probability: P(k) is log-uniform, draws independent."""
    words = torch.arange(layer.num_words, dtype=torch.float64)
    probabilities = ((words + 2).log() - (words + 1).log()) / math.log(layer.num_words + 1)
    assert math.isclose(probabilities.sum(), 1)
    for draw in itertools.product(range(layer.num_words), repeat=layer.num_samples):
        yield torch.tensor(sorted(draw)), float(probabilities[list(draw)].prod())


def test_the_expectation_over_all_draws_of_the_sampled_sum_is_the_sum_over_all_words():
    layer, hidden = small_layer(), torch.zeros(1, 1, dtype=torch.float64)
    logits = layer.bias.weight[:, 0].detach()
    counts = layer.log_expected_counts(torch.arange(5)).exp()

    def relative_error(loss, target):
        """exp(loss) - 1 is the others' sum over the target's exp(logit) / count."""
        scale = float(logits[target].exp() / counts[target])
        found = scale * sum(p * math.expm1(loss(target, s)) for s, p in all_draws(layer))
        expected = float(logits.exp().sum() - logits[target].exp())
        return abs(found / expected - 1)

    def naive(**flags):
        # the target's own count goes out of `scale` again, where it was not corrected for
        count = 1.0 if flags.get("corrected", True) else counts[target]
        return lambda t, s: math.log1p(
            math.expm1(naive_loss(layer, hidden[0], t, s, **flags).item()) * float(count)
        )

    for target in range(5):
        of_layer = relative_error(
            lambda t, s: layer.loss(hidden, torch.tensor([t]), s).item(), target
        )
        assert of_layer < 1e-12
        for flags in ({"corrected": False}, {"once": False}, {"hits": True}):
            assert relative_error(naive(**flags), target) > 0.03, flags


def test_where_the_model_is_right_few_samples_leave_hardly_a_gradient():
    """Exact over all draws and targets: 3 samples of 5 words; the full softmax leaves 0.

    Targets that are not corrected, as if they were always among the samples, leave 20 times more.
    """
    layer, hidden = small_layer(), torch.zeros(1, 1, dtype=torch.float64)
    bias = layer.bias.weight
    truth = bias[:, 0].detach().softmax(0)
    log_counts = layer.log_expected_counts(torch.arange(5))
    ours, uncorrected = torch.zeros(5).double(), torch.zeros(5).double()
    for samples, probability in all_draws(layer):
        for target in range(5):
            loss = layer.loss(hidden, torch.tensor([target]), samples)
            other = torch.log1p(torch.expm1(loss) * (-log_counts[target]).exp())
            share = probability * truth[target]
            for sum_, value in ((ours, loss), (uncorrected, other)):
                (gradient,) = torch.autograd.grad(value, [bias], retain_graph=True)
                sum_ += share * gradient.to_dense()[:, 0]
    assert ours.abs().max() < 0.004
    assert uncorrected.abs().max() > 20 * ours.abs().max()


class Uncorrected(SampledSoftmax):
    def log_expected_counts(self, words):
        return torch.zeros(len(words), dtype=torch.float64)


def gradients(layer, hidden, targets, loss):
    parameters = [hidden, layer.weight.weight, layer.bias.weight]
    found = torch.autograd.grad(loss(hidden, targets), parameters)
    return [gradient.to_dense().flatten() for gradient in found]


def standard_errors_off(make_layer, seed, num_draws=200):
    """Return how far the mean gradient of many draws is from the full softmax's: by hidden states,
    weights and biases, the norm of the differences over that of their standard errors."""
    torch.manual_seed(seed)
    counts = 1e6 / torch.arange(1, 2001)
    layer = make_layer(4, 2000, num_samples=1000, word_counts=counts).double()
    torch.nn.init.normal_(layer.weight.weight, std=0.5)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 5, 9, 2])  # frequent: nearly always among the samples
    draws = [gradients(layer, hidden, targets, layer) for _ in range(num_draws)]
    layer.eval()
    expected = gradients(layer, hidden, targets, layer)
    ratios = []
    for sampled, wanted in zip(zip(*draws, strict=True), expected, strict=True):
        sampled = torch.stack(sampled)
        errors = sampled.std(0) / math.sqrt(num_draws)
        assert errors.norm() < 0.01 * wanted.norm()  # it is a sharp test
        ratios.append(float((sampled.mean(0) - wanted).norm() / errors.norm()))
    return ratios


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampled_gradient_is_the_full_one_on_average(seed):
    """1,000 samples of 2,000 words, half of which are rarely there; 1 is what chance leaves."""
    assert max(standard_errors_off(SampledSoftmax, seed)) < 2


def test_without_the_correction_the_average_would_be_another():
    assert min(standard_errors_off(Uncorrected, 0)) > 10


def test_without_removing_hits_the_average_would_be_another(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda logits, *_: logits)
    assert min(standard_errors_off(SampledSoftmax, 0)) > 4


def test_the_bias_of_the_gradient_falls_with_the_number_of_samples():
    biases = []
    for num_samples in (60, 240, 960):
        torch.manual_seed(0)
        layer = SampledSoftmax(3, 60, num_samples).double()
        torch.nn.init.normal_(layer.weight.weight)
        hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 3, 20, 59, 20])
        draws = [gradients(layer, hidden, targets, layer) for _ in range(200)]
        layer.eval()
        full = torch.cat(gradients(layer, hidden, targets, layer))
        mean = torch.stack([torch.cat(draw) for draw in draws]).mean(0)
        biases.append(float((mean - full).norm() / full.norm()))
    assert 0.1 < biases[0] < 0.3
    assert biases[1] < biases[0] / 2 and biases[2] < biases[1] / 4


def test_words_are_drawn_as_often_as_the_correction_says():
    torch.manual_seed(0)
    layer, num_draws = SampledSoftmax(1, 50, 20), 4000
    draws = torch.stack([layer.draw(torch.device("cpu")) for _ in range(num_draws)])
    assert draws.min() >= 0 and draws.max() < 50
    assert (draws.diff(dim=1) >= 0).all()
    is_there = functional.one_hot(draws, 50).any(1).double().mean(0)
    expected = layer.log_expected_counts(torch.arange(50)).exp()
    errors = (expected * (1 - expected) / num_draws).sqrt()
    assert ((is_there - expected) / errors).abs().max() < 4
    assert expected[0] > 0.95 and expected[-1] < 0.1


def test_the_last_words_of_a_million_can_be_drawn_one_by_one(monkeypatch):
    num_words = 1_000_000
    wanted = torch.arange(num_words - 100, num_words)
    uniform = (wanted.double() + 1.5).log() / math.log(num_words + 1)
    monkeypatch.setattr(torch, "rand", lambda num, dtype, device: uniform.to(dtype))
    with torch.device("meta"):
        layer = SampledSoftmax(1, num_words, 100)
    assert torch.equal(layer.draw(torch.device("cpu")), wanted)


def test_draws_follow_the_default_generator():
    layer = SampledSoftmax(1, V, 16)
    state = torch.get_rng_state()
    first, second = layer.draw(torch.device("cpu")), layer.draw(torch.device("cpu"))
    torch.set_rng_state(state)
    assert torch.equal(layer.draw(torch.device("cpu")), first)
    assert not torch.equal(first, second)


def test_sampled_training_touches_few_rows_and_makes_nothing_of_all_words():
    torch.manual_seed(0)
    num_words, num_positions, num_samples = 20_000, 8, 64
    layer = SampledSoftmax(16, num_words, num_samples)
    hidden = torch.randn(num_positions, 16, requires_grad=True)
    targets = torch.randint(num_words, (num_positions,))
    with Made() as made:
        layer(hidden, targets).backward()
    assert made.largest <= (num_positions + num_samples) * 16
    assert row_sparse_names(layer) == ["weight.weight", "bias.weight"]
    for parameter in layer.parameters():
        gradient = parameter.grad
        assert gradient.is_sparse and gradient.sparse_dim() == 1
        rows = gradient.coalesce().indices()[0]
        assert set(targets.tolist()) <= set(rows.tolist())
        assert len(rows) <= num_positions + num_samples
