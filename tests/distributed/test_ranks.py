"""The collectives and the exchange on real ranks, under every way of starting them."""

from pathlib import Path

import pytest

from tests import jobs

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_ranks.py"))


@pytest.mark.parametrize(
    ("launcher", "num_ranks"),
    [("horovodrun", 2), ("horovodrun --gloo", 2), ("mpirun", 2), ("mpirun", 4),
     ("horovodrun --gloo", 4)],
)  # fmt: skip
def test_ranks_agree_to_the_bit(launcher, num_ranks, tmp_path):
    controller = "gloo" if "gloo" in launcher else "mpi"
    outcome = jobs.run(launcher, num_ranks, [PROGRAM, controller], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(num_ranks):
        assert f"rank {rank} of {num_ranks} agrees" in outcome.output
