"""Three short trainings, on one rank and on two, give the recorded losses and state to the bit.

A change that is meant to change them records them anew (see record.py) in the same commit.
"""

import json

import pytest

from tests.golden import record

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.xdist_group("golden"),
    pytest.mark.timeout(2 * record.PATIENCE + 60),  # the first test runs both jobs
]


@pytest.fixture(scope="module")
def computed():
    if not record.folder().exists():
        pytest.skip(f"no curves are recorded for {record.kind()}; `{record.COMMAND}` records them, "
                    "at a commit that is known to be right")  # fmt: skip
    return record.compute()


def first_difference(golden, found):
    """Describe the first step in which some rank's loss differs; None if none does."""
    by_step = [zip(*(rank["losses"] for rank in ranks), strict=True) for ranks in (golden, found)]
    for step, (expected, got) in enumerate(zip(*by_step, strict=True)):
        if expected != got:
            return f"step {step}: losses {got}, recorded {expected}"
    return None


@pytest.mark.parametrize("ranks", ["ranks: 1", "ranks: 2"])
@pytest.mark.parametrize("name", ["recommended", "dgc_sgd", "dense"])
def test_losses_parameters_and_state_are_the_recorded_ones(name, ranks, computed):
    golden = json.loads((record.folder() / f"{name}.json").read_text())[ranks]
    found = computed[name][ranks]
    assert first_difference(golden, found) is None
    assert found == golden  # the digests of parameters and state
