"""Jobs under --restarts that lose ranks, launchers and hosts go on by themselves.

The short suite's case is in test_signals.py; that of small programs in unit/launch/.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.integration.launched import LAUNCHERS

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.xdist_group("undisturbed")]
STARTERS = ("mpirun", "horovodrun", "torchrun")
AGENT = """#!/bin/sh
# Starts a command "on a host", as ssh would: here, as long as the host's file is there.
cd "$(dirname "$0")" && [ -e "$1" ] || exit 255
HOST_OF_TEST=$1
export HOST_OF_TEST
shift
exec sh -c "$*"
"""


def victims(processes, kind: str) -> list[int]:
    ranks = processes.ranks()
    if kind == "rank":
        return [max(ranks)]
    if kind == "all ranks":
        return ranks
    return [
        pid for pid, words in processes.words().items()
        if "launch.supervise" not in words
        and any(os.path.basename(word) in STARTERS for word in words[:2])
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["rank", "all ranks", "launcher"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_is_killed_at_every_moment_ends_with_the_same_bits(
    launched, launcher, kind, undisturbed_hash
):
    launched.start(launcher, "--restarts", "3")
    for number, moment in enumerate(("busy", "saving", "busy"), start=1):
        launched.await_text("training begins", times=number)
        launched.await_moment(moment)
        for pid in victims(launched.processes, kind):
            os.kill(pid, signal.SIGKILL)
        launched.await_text("launch: starting again", times=number)
    outcome = launched.end()
    assert outcome.status == 0, outcome.output[-5000:]
    assert outcome.output.count("launch: starting again") == 3
    assert launched.runs.result()["parameter_hash"] == undisturbed_hash


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """A folder: a host answers mpirun while a file of its name is there."""
    folder = tmp_path / "hosts"
    folder.mkdir()
    agent = folder / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", str(agent))
    return folder


def test_a_job_goes_on_without_a_host_that_is_gone(launched, hosts):
    (hosts / "a").touch()
    (hosts / "b").touch()
    launched.start_words(["launch/mpirun.sh", "-H", "a:1,b:1", "--restarts", "2"])
    launched.await_moment("busy")
    (hosts / "b").unlink()
    for pid in launched.processes.words():
        if b"HOST_OF_TEST=b" in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, signal.SIGKILL)
    outcome = launched.end()
    assert outcome.status == 0, outcome.output[-5000:]
    assert "+ mpirun -np 1 -H a:1" in outcome.output
    assert "now with 1 ranks instead of 2" in outcome.output
    assert launched.runs.result()["world_size"] == 1


def test_a_host_that_does_not_answer_yet_is_waited_for(launched, hosts):
    (hosts / "a").touch()
    words = ["launch/mpirun.sh", "-H", "a:1,b:1", "--restarts", "2", "--min-np", "2"]
    launched.start_words(words)
    launched.await_text("launch: waiting: b do not answer")
    (hosts / "b").touch()
    outcome = launched.end()
    assert outcome.status == 0, outcome.output[-5000:]
    assert launched.runs.result()["world_size"] == 2
