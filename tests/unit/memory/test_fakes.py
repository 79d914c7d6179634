"""What stands in for kernels and values: sizes are those of a step in the steady state."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dgc.selection import selector as sparsify
from dgc.selection.plan import plan_sparsity
from dgc.selection.selector import Selector
from dgc.wire.codec import Codec
from dgc.worker.residual import Compensation
from memory.fakes import without_data
from parsimony_kernels.buffers import ops as buffers

NUMEL = 100_000


@pytest.fixture
def fake():
    with FakeTensorMode(), without_data():
        yield


def test_a_pass_lists_the_entries_that_are_aimed_at(fake):
    selector = Selector(plan_sparsity(NUMEL, 0.01))
    compensation = Compensation(residual_dtype="bfloat16")
    found = compensation.accumulate(
        "w", torch.zeros(NUMEL), selection=selector.begin(compensation.num_steps)
    )
    (report,) = buffers.read_reports([found])
    taken = selector.settle(found, report, compensation, "w")
    assert taken.indices_K.shape == taken.values_K.shape == (1000,)
    assert compensation.num_bytes() == {"velocity": 0, "residual": 2 * NUMEL}


def test_a_ranking_finds_as_many_as_are_asked_for(fake):
    assert sparsify.largest_indices(torch.zeros(NUMEL), 37).shape == (37,)
    assert sparsify.largest_indices(torch.zeros(20), 37).shape == (20,)


@pytest.mark.parametrize("num_entries", [0, 1, 31, 32, 33, 1000])
@pytest.mark.parametrize("coding", ["int32", "int64", "elias_fano"])
def test_a_message_has_the_entries_of_its_length(fake, num_entries, coding):
    codec = Codec(("a", "b"), (6000, 4000), value_dtype="float32", index_coding=coding)
    positions = torch.zeros(num_entries, dtype=torch.int64)
    message = codec.encode(positions, torch.zeros(num_entries))
    assert message.numel() == codec.message_bytes(num_entries)
    found = codec.decode_one(message)
    assert found.positions_K.numel() == found.values_M.numel() == num_entries
    parts = codec.split(found.positions_K, found.values_M)
    assert [indices.numel() for indices, _ in parts] == [
        num_entries * 6 // 10, num_entries - num_entries * 6 // 10
    ]  # fmt: skip


def test_what_shares_memory_has_one_address_and_a_copy_another(fake):
    layer = nn.Linear(5, 7)
    other = copy.deepcopy(layer)
    assert layer.weight.data_ptr() == layer.weight.view(-1).data_ptr() != 0
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.requires_grad


def test_tied_parameters_stay_tied_in_a_copy(fake):
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    model[1].weight = model[0].weight
    other = copy.deepcopy(model)
    assert other[1].weight is other[0].weight
