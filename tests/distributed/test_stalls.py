"""A rank that stands still: the others wait, or end the job within the limit and say who it is."""

import math
import re
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_stalls.py"))
LIMIT = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"


def run(launcher, seconds, tmp_path, dynamic=0):
    words = [PROGRAM, str(seconds), str(dynamic)]
    return jobs.run(launcher, 3, words, tmp_path / f"log-{seconds}", timeout=150)


@pytest.mark.parametrize(
    ("launcher", "dynamic"),
    [
        ("mpirun", 0),
        long("horovodrun --gloo", 0),
        long("horovodrun --gloo", 1),
        long("mpirun", 1),
        long("torchrun", 0),
    ],
)
def test_a_rank_that_never_goes_on_ends_the_job_with_its_name(
    launcher, dynamic, tmp_path, monkeypatch
):
    monkeypatch.setenv(LIMIT, "4")
    start = time.monotonic()
    outcome = run(launcher, math.inf, tmp_path, dynamic)
    assert outcome.status != 0
    assert time.monotonic() - start < 100
    assert re.search(r"waited 4 s for .*collective .*(gathered|summed)", outcome.output)
    if "Horovod to start" not in outcome.output:  # inside of it, nobody can be asked
        assert re.search(r"[Mm]issing: rank 1 on|rank 1 |ranks \[1\]", outcome.output)
    assert "rank 0 on" not in outcome.output.split("issing:")[-1][:60]


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [0, 1])
@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_a_rank_that_stands_still_for_5_s_changes_no_bit(launcher, dynamic, tmp_path):
    hashes = set()
    for seconds in (0.1, 5):
        outcome = run(launcher, seconds, tmp_path, dynamic)
        assert outcome.status == 0, outcome.output[-5000:]
        assert "rank 1 stops" in outcome.output
        hashes |= set(re.findall(r"rank \d has (\w{64})", outcome.output))
    assert len(hashes) == 1
