"""The library in a loop that is not ours, under every launcher."""

from pathlib import Path

import pytest

from tests import jobs
from tests.long import all_but_long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_own_loop.py"))


@pytest.mark.parametrize(
    "launcher", all_but_long(["horovodrun --gloo"], jobs.LAUNCHERS)
)
def test_a_loop_learns_with_the_readmes_change(launcher, tmp_path):
    written_for = "torch" if launcher == "torchrun" else "horovod"
    outcome = jobs.run(launcher, 2, [PROGRAM, written_for], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(2):
        assert f"rank {rank} of 2 learns" in outcome.output
