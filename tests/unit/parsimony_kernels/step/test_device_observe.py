"""Feeding a second moment without a step in CUDA, run on the CPU by tests/emulation."""

import itertools
from types import ModuleType

import pytest
import torch

from parsimony_kernels.runtime.operands import Rule
from parsimony_kernels.step import arguments, device, reference
from parsimony_kernels.step.observing import Observation, Observed
from tests.emulation.emulator import BACKWARD, FORWARD
from tests.tolerances import assert_close
from tests.unit.parsimony_kernels import cases
from tests.unit.parsimony_kernels.cases import CPU, Case, Guarded

SHUFFLED = 7
SECONDS = cases.SECONDS[1:]  # without "none"
SCALES = (None, 0.37)


def observe_cases() -> list[Case]:
    """Every second moment of every size; types and rules take turns."""
    kinds = itertools.product(SECONDS, cases.SIZES)
    turns = itertools.cycle(itertools.product(cases.DTYPES, cases.RULES))
    return [Case("none", second, "dense", size, *turn)
            for (second, size), turn in zip(kinds, turns, strict=False)]  # fmt: skip


def observed(
    case: Case, scale: float | None, implementation: ModuleType, where: torch.device
) -> dict[str, torch.Tensor]:
    """Return the state after a few gradients."""
    run, guarded = cases._Run(case, implementation, where), Guarded(where)
    rule = Rule(lr=0.1, **cases.RULES[case.rule])
    factor = None if scale is None else guarded.copy(torch.tensor([scale]))
    for step in range(cases.NUM_STEPS):
        gradient, _ = cases.arrivals(case, step)
        implementation.observe(
            [Observation(Observed(run.second), guarded.copy(gradient), rule, factor)]
        )
    run.guarded.check()
    guarded.check()
    return {name: tensor.cpu() for name, tensor in run.state.items()}


def check_observe(case: Case, scale: float | None, where: torch.device = CPU) -> None:
    actual, expected = (
        observed(case, scale, *side) for side in ((device, where), (reference, CPU))
    )
    for name, tensor in expected.items():
        if case.second == "factored":
            assert_close(actual[name], tensor)
        else:
            cases.assert_same(actual[name], tensor, name, case)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", observe_cases(), ids=str)
def test_observing_equals_the_reference(emulated, case, scale):
    emulated()
    check_observe(case, scale)


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("second", ["full", "cover", "cover I", "factored", "table 3"])
def test_threads_take_many_rows_and_blocks_many_tiles_in_any_order(
    emulated, monkeypatch, second, order
):
    emulated(order)
    monkeypatch.setattr(arguments, "WANTED_TILES", 6)
    monkeypatch.setattr(device, "MAX_BLOCKS", 3)
    check_observe(Case("none", second, "dense", (200, 150)), 0.37)


@pytest.mark.parametrize("wanted", [6, 13])  # 16 rows a thread, and 7, which are no multiple
@pytest.mark.parametrize("second", ["cover", "factored"])
def test_whole_tiles_are_read_several_rows_at_a_time(emulated, monkeypatch, second, wanted):
    emulated(SHUFFLED)
    monkeypatch.setattr(arguments, "WANTED_TILES", wanted)
    monkeypatch.setattr(Guarded, "copy", lambda self, tensor: tensor.clone())  # on boundaries
    for scale in (0.37, None):
        check_observe(Case("none", second, "dense", (250, 260)), scale)


@pytest.mark.parametrize("second", ["full", "cover", "cover I", "factored", "table 3"])
def test_the_state_is_that_after_a_dense_step(emulated, second):
    """With neither decay nor sign, which are the parameter's."""
    emulated()
    case = Case("none", second, "dense", (65, 40), torch.bfloat16)
    run = cases._Run(case, device, CPU)
    rule = Rule(lr=0.1, **(cases.AVERAGES | {"weight_decay": 0.0, "sign": 1.0}))
    for step in range(cases.NUM_STEPS):
        gradient, _ = cases.arrivals(case, step)
        device.step(run.param, gradient, rule, None, run.second, None)
    for name, tensor in observed(case, None, device, CPU).items():
        assert name == "param" or torch.equal(tensor, run.state[name]), name
