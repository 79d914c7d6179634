"""What Horovod's own tests of its DistributedOptimizer ask, on real ranks."""

from pathlib import Path

import pytest

from tests import jobs

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_horovod_habits.py"))


def test_horovods_tests_hold_or_the_readme_says_why_not(tmp_path):
    outcome = jobs.run("mpirun", 2, [PROGRAM], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(2):
        assert f"rank {rank} of 2 has Horovod's habits" in outcome.output
