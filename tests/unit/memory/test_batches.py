"""The largest batch: it fits, and one sample more does not."""

import pytest

from memory import Predictor, contenders, largest_batch
from memory.job import this_run
from memory.predict import BatchShapes
from tests.unit.memory.small_jobs import job_of, texts

MIB = 2**20


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["this run", "recommended"])
@pytest.mark.parametrize("memory_mib", [8, 20, 21.3])
def test_the_largest_batch_fits_and_one_more_does_not(name, memory_mib):
    predictor = Predictor(job_of("perceptron"))
    chosen = next(each for each in contenders(predictor.job) if each.name == name)
    found = largest_batch(predictor, chosen, int(memory_mib * MIB))
    assert found.peak_bytes <= memory_mib * MIB
    assert predictor(chosen, found.batch_size).peak_bytes == found.peak_bytes
    assert predictor(chosen, found.batch_size + 1).peak_bytes > memory_mib * MIB
    assert found.batch_size > 10


def test_a_batch_below_the_jobs_own_is_found_too():
    predictor = Predictor(job_of("convolutional", batch_size=64))
    chosen = this_run(predictor.job)
    bound = predictor(chosen, 5).peak_bytes
    assert largest_batch(predictor, chosen, bound).batch_size == 5


def test_there_is_none_where_one_sample_does_not_fit():
    predictor = Predictor(job_of("perceptron"))
    assert largest_batch(predictor, this_run(predictor.job), MIB) is None


def test_the_axis_of_samples_is_found_wherever_it_is():
    shapes = BatchShapes(texts, 6).at(11)
    assert [shape for shape, _ in shapes] == [(20, 11), (20, 11)]
    assert [shape for shape, _ in BatchShapes(texts, 1).at(5)] == [(20, 5), (20, 5)]
