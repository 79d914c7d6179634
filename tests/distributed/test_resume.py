"""To resume Horovod's way: rank 0 loads, the rest is broadcast; with every optimizer."""

from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_resume.py"))


@pytest.mark.parametrize("launcher", ["mpirun", long("torchrun")])
def test_what_rank_0_loads_alone_and_broadcasts_is_as_if_all_had_loaded_it(launcher, tmp_path):
    outcome = jobs.run(launcher, 2, [PROGRAM], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(2):
        assert f"rank {rank} of 2 resumes" in outcome.output
