"""Jobs of 4, 2, 3 and 4 ranks that take over from one another."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_handover.py"))


@pytest.mark.parametrize(
    ("launcher", "sizes"),
    [
        long("mpirun", [4, 2, 3, 4]),  # the short suite's are tests/unit/.../test_handover.py
        long("torchrun", [4, 2, 3, 4]),
        long("horovodrun --gloo", [4, 2, 3, 4]),
    ],
)
def test_what_was_not_sent_goes_on_through_jobs_of_other_sizes(launcher, sizes, tmp_path):
    for before, now in pairwise([0, *sizes]):
        words = [PROGRAM, str(tmp_path / "states")]
        outcome = jobs.run(launcher, now, words, tmp_path / f"log-{before}-{now}")
        assert outcome.status == 0, outcome.output[-5000:]
        for rank in range(now):
            assert f"rank {rank} of {now} went on from {before}" in outcome.output
