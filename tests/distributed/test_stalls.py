"""A rank that stands still or is slow: the others wait, or end the job and say who it is."""

import math
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_stalls.py"))
LIMIT = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"


def run(launcher, what, tmp_path, dynamic=0, victim=1):
    words = [PROGRAM, str(what), str(victim), str(dynamic)]
    return jobs.run(launcher, 3, words, tmp_path / f"log-{what}", timeout=150)


@pytest.mark.parametrize(
    ("launcher", "dynamic", "victim"),
    [
        ("mpirun", 0, 0),  # which keeps the list of those who wait
        long("mpirun", 0, 1),
        *(long("horovodrun --gloo", dynamic, victim) for dynamic in (0, 1) for victim in (0, 1)),
        long("mpirun", 1, 1),
        *(long("torchrun", 0, victim) for victim in (0, 1)),
    ],
)
def test_a_rank_that_never_goes_on_ends_the_job_with_its_name(
    launcher, dynamic, victim, tmp_path, monkeypatch
):
    monkeypatch.setenv(LIMIT, "4")
    start = time.monotonic()
    outcome = run(launcher, math.inf, tmp_path, dynamic, victim)
    assert outcome.status != 0
    assert time.monotonic() - start < 100
    assert re.search(r"waited 4 s for .*collective .*(gathered|summed)", outcome.output)
    if "Horovod to start" not in outcome.output:  # inside of it, nobody can be asked
        named = rf"[Mm]issing: rank {victim} on|rank {victim} |ranks \[{victim}\]"
        assert re.search(named, outcome.output), outcome.output[-3000:]
    if not dynamic:  # else a rank that stands in Horovod cannot say that it waits, too
        assert f"rank {1 - victim} on" not in outcome.output.split("issing:")[-1][:60]


@pytest.fixture
def jumping_clock(tmp_path, monkeypatch):
    """Preload a clock that check_stalls.py lets jump."""
    source, library = Path(PROGRAM).with_name("jumping_clock.c"), tmp_path / "jumping_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [0, 1])
@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_a_rank_that_stands_still_starves_or_has_a_jumping_clock_changes_no_bit(
    launcher, dynamic, tmp_path, jumping_clock
):
    hashes = set()
    for what in (0.1, 5, "starved", "clock"):
        outcome = run(launcher, what, tmp_path, dynamic)
        assert outcome.status == 0, outcome.output[-5000:]
        assert f"rank 1: {what}" in outcome.output
        hashes |= set(re.findall(r"rank \d has (\w{64})", outcome.output))
    assert len(hashes) == 1
