"""What the allocator says of steps whose bytes are known."""

import pytest
import torch
from torch import nn

from memory import held_by, measure

MIB = 2**18
CPU = torch.device("cpu")


def test_the_peak_is_what_is_held_and_what_a_step_takes():
    held = torch.zeros(4 * MIB)

    def step():
        first = torch.ones(MIB)
        del first
        second = torch.ones(3 * MIB)
        del second

    found = measure(step, device=CPU, held=lambda: [held])
    assert abs(found.peak_bytes - 7 * 2**20) < 5000
    assert found.num_steps == 3


def test_what_a_step_renews_counts_once_kept_and_once_beside_it():
    kept = {"residual": torch.zeros(2 * MIB)}

    def step():
        kept["residual"] = kept["residual"] + 1  # the old is there until the new is

    found = measure(step, device=CPU, held=lambda: kept.values(), kept=lambda: {"residual": 8})
    assert abs(found.peak_bytes - 4 * 2**20) < 5000
    assert found.kept == {"residual": 8}


def test_the_first_step_which_makes_state_is_not_looked_at():
    state = {}

    def step():
        if not state:
            work = torch.zeros(16 * MIB)
            state["moment"] = work[:MIB].clone()

    assert abs(measure(step, device=CPU, held=list).peak_bytes - 2**20) < 5000


def test_what_a_model_and_its_optimizer_hold():
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.zeros(2, 10)).sum().backward()
    optimizer.step()
    extra = torch.zeros(7)
    bytes_held = sum(t.nbytes for t in held_by(model, optimizer, {"x": [extra]}))
    num_parameters = 200 + 20 + 40
    assert bytes_held == 16 * num_parameters + 4 * 4 + 2 * 80 + 8 + 28


def test_one_step_is_refused():
    with pytest.raises(ValueError, match="num_steps is 1; allowed: 2 or more"):
        measure(lambda: None, device=CPU, held=list, num_steps=1)
