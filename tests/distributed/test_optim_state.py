"""Horovod's broadcast_optimizer_state with optim's optimizers, on real ranks."""

from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_optim_state.py"))


@pytest.mark.parametrize("launcher", ["horovodrun", long("horovodrun --gloo")])
def test_a_broadcast_leaves_parameters_alone_and_gives_every_rank_the_same_state(
    launcher, tmp_path
):
    controller = "gloo" if "gloo" in launcher else "mpi"
    outcome = jobs.run(launcher, 2, [PROGRAM, controller], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(2):
        assert f"rank {rank} of 2 agrees" in outcome.output
