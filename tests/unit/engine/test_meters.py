import pytest
import torch

from dgc.local import run_local
from engine.meters import AccuracyMeter


def test_accuracies_over_uneven_shares_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(101, 10, generator=generator)
    labels = torch.randint(10, (101,), generator=generator)
    order = logits.argsort(dim=1, descending=True)
    hits = {k: sum(labels[i] in order[i, :k] for i in range(101)) for k in (1, 5)}

    def work(comm):
        meter = AccuracyMeter((1, 5), torch.device("cpu"))
        share = slice(0, 90) if comm.rank == 0 else slice(90, 101)
        for part, of in zip(logits[share].split(32), labels[share].split(32), strict=True):
            meter.add(part, of, torch.nn.functional.cross_entropy(part, of))
        return meter.reduce(comm, "test")

    for metrics in run_local(2, work):
        assert metrics["acc/test_top1"] == pytest.approx(100 * hits[1] / 101)
        assert metrics["acc/test_top5"] == pytest.approx(100 * hits[5] / 101)
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert metrics["loss/test"] == pytest.approx(loss, rel=1e-5)


def test_more_places_than_classes_is_always_a_hit():
    meter = AccuracyMeter((5,), torch.device("cpu"))
    meter.add(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor(1.0))
    (metrics,) = run_local(1, lambda comm: meter.reduce(comm, "test"))
    assert metrics["acc/test_top5"] == 100
