import torch

from dgc.comm.local import run_local
from engine.meters import Sums, smaller_is_better


def test_sums_of_batches_and_ranks_are_those_of_all():
    def work(comm):
        sums = Sums(2, torch.device("cpu"))
        for n in range(comm.rank + 1):
            sums.add(torch.tensor([1.0, 0.1 * n], dtype=torch.float64))
        return sums.reduce(comm, "test"), sums.values.tolist()

    (first, mine), (second, _) = run_local(2, work)
    assert first == second == [3.0, 0.1]
    assert mine == [1.0, 0.0]  # a rank's own sums stay


def test_the_name_of_a_metric_says_which_way_is_better():
    assert smaller_is_better("loss/test") and smaller_is_better("perplexity/valid")
    assert not smaller_is_better("acc/test_top1")
