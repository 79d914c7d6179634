import math

import pytest
import torch
from torch import nn

from workloads.tasks import Classification, LanguageModelling, MaskedLanguageModelling


def test_accuracies_and_loss_of_uneven_batches_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, 10, generator=generator)
    labels = torch.randint(10, (101,), generator=generator)
    order = logits.argsort(dim=1, descending=True)
    hits = {k: sum(labels[i] in order[i, :k] for i in range(101)) for k in (1, 5)}
    task, sums = Classification(nn.CrossEntropyLoss()), 0
    for part in zip(logits.split(32), labels.split(32), strict=True):
        sums = sums + task(nn.Identity(), part, None)[1]
    metrics = task.metrics(sums.tolist(), "test")
    assert metrics["acc/test_top1"] == pytest.approx(100 * hits[1] / 101)
    assert metrics["acc/test_top5"] == pytest.approx(100 * hits[5] / 101)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert metrics["loss/test"] == pytest.approx(loss, rel=1e-5)


def test_more_places_than_classes_is_always_a_hit():
    task = Classification(nn.CrossEntropyLoss(), (5,))
    _, sums, _ = task(nn.Identity(), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), None)
    assert task.metrics(sums.tolist(), "test")["acc/test_top5"] == 100


class Uniform(nn.Module):
    """Knows nothing of ten words; counts its calls in its state."""

    def forward(self, words, targets, state=0):
        loss = nn.functional.cross_entropy(torch.zeros(*targets.shape, 10).movedim(-1, 1), targets)
        return loss, state + 1


def test_perplexity_counts_only_targets_that_are_there():
    task = LanguageModelling()
    targets = torch.tensor([[1, 2], [3, -100]])
    loss, sums, state = task(Uniform(), (targets, targets), 4)
    assert (sums[0], state) == (3, 5)
    nothing = torch.full((2, 2), -100)
    sums = sums + task(Uniform(), (nothing, nothing), state)[1]
    assert task.metrics(sums.tolist(), "test")["perplexity/test"] == pytest.approx(10)
    assert loss.item() == pytest.approx(math.log(10))


def test_training_tells_no_perplexity_since_its_loss_may_be_sampled():
    assert LanguageModelling().metrics([1.0, 2.0], "train") == {"loss/train": 2.0}


def test_a_perplexity_beyond_all_numbers_is_infinite():
    assert MaskedLanguageModelling().metrics([1.0, 1e4], "valid")["perplexity/valid"] == math.inf
