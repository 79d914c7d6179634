import random

import pytest
import torch

from dgc.selection import ranking
from dgc.selection.ranking import largest_indices, split_marked
from tests.emulation.pretended import Pretended, Watch


def test_ties_go_to_the_lower_index():
    values = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 2.0])
    zeros = torch.tensor([0.0, 3.0, 0.0, 3.0, 1.0])
    for is_known in (False, True):  # how many are not 0: a GPU is then not waited for
        for k, expected in ((4, [0, 1, 2, 5]), (2, [1, 2]), (6, [*range(6)]), (9, [*range(6)])):
            found = largest_indices(values.abs(), k, 6 if is_known else None)
            assert found.tolist() == expected
        for k, expected in ((4, [1, 3, 4]), (1, [1]), (5, [1, 3, 4])):
            assert largest_indices(zeros, k, 3 if is_known else None).tolist() == expected
    assert largest_indices(0 * zeros, 2, 0).tolist() == []


@pytest.mark.parametrize("mark", [ranking._mark_one_by_one, ranking._mark_together])
def test_the_largest_of_each_tensor_are_marked_and_ties_go_to_the_lower_index(mark):
    draw = random.Random(5)
    counts = [draw.randint(1, 40) for _ in range(30)]
    wanted = [draw.randint(1, count) for count in counts]
    magnitudes = [draw.randint(1, 9) for _ in range(sum(counts))]  # with many ties
    expected, least, begin = [], [], 0
    for count, want in zip(counts, wanted, strict=True):
        part = magnitudes[begin : begin + count]
        chosen = sorted(range(count), key=lambda i: (-part[i], i))[:want]
        expected += [i in chosen for i in range(count)]
        least.append(min(part[i] for i in chosen))
        begin += count
    marks_K, least_T = mark(torch.tensor(magnitudes, dtype=torch.float32), counts, wanted)
    assert marks_K.tolist() == expected
    assert least_T.tolist() == least


@pytest.mark.parametrize("wrapper", [lambda there: there, Pretended], ids=["cpu", "gpu"])
def test_the_marked_and_the_others_keep_their_order(wrapper):
    marks = random.Random(6).choices([False, True], k=500)
    expected = [[i for i, each in enumerate(marks) if each is wanted] for wanted in (True, False)]
    with Watch() as watch:
        parts = split_marked(wrapper(torch.tensor(marks)), sum(marks))
        assert watch.num_waits == 0
        assert [part.tolist() for part in parts] == expected
