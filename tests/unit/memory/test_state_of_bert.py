"""BERT-Large's shape: state bytes as the report says and as the optimizers' own tensors are."""

import dataclasses

import pytest
import torch

import optim
from memory import contenders, predict
from memory.rehearsal import STATE
from tests.unit.memory.small_jobs import job_of

NUM_PARAMETERS = 335_174_458
NUM_TENSORS = 298


def bert_large():
    from workloads.masked_language_model import MaskedLanguageModel

    return MaskedLanguageModel(
        num_words=30522, width=1024, num_heads=16, num_layers=24, feedforward=4096,
        max_positions=512,
    )  # fmt: skip


def touch_all(model, batch, carried):
    """A loss that gives every parameter a gradient, as state does not depend on the forward."""
    return sum(p.sum() for p in model.parameters()), None, None


@pytest.fixture(scope="module")
def on_meta():
    with torch.device("meta"):
        return bert_large()


def nbytes(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in tensors if torch.is_tensor(t))


def told(name):
    job = dataclasses.replace(job_of("perceptron"), make_model=bert_large, task=touch_all)
    found = predict(job, next(each for each in contenders(job) if each.name == name))
    assert found.num_parameters == NUM_PARAMETERS
    return found, sum(size for kind, size in found.kept.items() if kind.startswith(STATE))


def test_adam_keeps_eight_bytes_a_parameter(on_meta):
    _, state = told("Adam")
    assert len(list(on_meta.parameters())) == NUM_TENSORS
    assert state == 8 * NUM_PARAMETERS + 4 * NUM_TENSORS


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("CMS-RMSprop", lambda p: optim.SketchRMSprop(p, lr=1e-3)),
        ("SM3, momentum 0.9", lambda p: optim.SM3(p, lr=1e-3, momentum=0.9, beta=0.999)),
    ],
)
def test_state_is_that_of_the_optimizers_themselves(name, make, on_meta):
    _, state = told(name)
    mine = make(on_meta.parameters())
    assert state == nbytes(mine) == mine.num_bytes


def test_ours_keeps_rows_and_columns_and_two_bytes_a_parameter(on_meta):
    found, state = told("recommended")
    mine = optim.FactoredAdam(on_meta.parameters(), lr=1e-3, betas=(0.0, 0.999))
    matrices = [p for p in on_meta.parameters() if p.dim() > 1]
    least = mine.defaults["min_compressed_numel"]  # the two types of segments are fewer
    second = [sum(p.shape) if p.numel() >= least else p.numel() for p in matrices]
    assert found.kept["residual"] == 2 * sum(p.numel() for p in matrices)
    assert state + found.kept["statistics"] == nbytes(mine) + 4 * len(matrices)  # counters
    assert found.kept["statistics"] == 4 * sum(second) + 4 * len(matrices)
    assert min(p.numel() for p in matrices) < least < sorted(p.numel() for p in matrices)[1]
    assert found.kept["residual"] + state + found.kept["statistics"] < 2.02 * NUM_PARAMETERS
