"""SIGTERM, SIGINT and SIGUSR1 to launchers and ranks: they save and stop, nothing stays behind."""

import os
import signal
import time

import pytest

from tests.integration.launched import LAUNCHERS

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("undisturbed")]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def test_a_run_that_is_stopped_again_and_again_and_loses_a_rank_keeps_its_bits(
    launched, undisturbed_hash
):
    launched.stop("train.sh", signal.SIGTERM, "launcher", "busy")
    launched.stop("train.sh", signal.SIGINT, "rank", "saving")
    launched.start("train.sh", "--restarts", "2")
    launched.await_moment("busy")
    launched.send(signal.SIGKILL, "rank")
    outcome = launched.end()
    assert outcome.status == 0, outcome.output[-5000:]
    assert outcome.output.count("launch: starting again") == 1
    assert outcome.output.count("resuming after step") == 2
    assert launched.runs.result()["parameter_hash"] == undisturbed_hash


@pytest.mark.long
@pytest.mark.parametrize("target", ["launcher", "rank"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_signal_at_every_moment_saves_and_stops(
    launched, launcher, number, target, undisturbed_hash
):
    for moment in ("busy", "resuming", "saving"):
        seconds = launched.stop(launcher, number, target, moment)
        print(f"| {launcher} | {number.name} | {target} | {moment} | {seconds:.1f} |")
    assert launched.finish(launcher) == undisturbed_hash


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_before_ranks_listen_ends_the_job(launched, launcher, number):
    """It has nothing to save then. A rank that already listens stops before its first step."""
    launched.start(launcher)
    launched.await_moment("starting")
    launched.send(number, "launcher")
    sent = time.monotonic()
    outcome = launched.end()
    allowed = {128 + number, 130 if number == signal.SIGINT else 0}
    assert outcome.status in allowed, outcome.output[-5000:]
    assert "Traceback" not in outcome.output
    print(f"| {launcher} | {number.name} | launcher | starting | {time.monotonic() - sent:.1f} |")


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_signal_ends_the_job_at_once(launched, launcher):
    launched.start(launcher)
    launched.await_moment("busy")
    for pid in launched.processes.ranks():
        os.kill(pid, signal.SIGSTOP)  # ranks that will never come to the end of their step
    launched.send(signal.SIGTERM, "launcher")
    time.sleep(1.5)
    launched.send(signal.SIGTERM, "launcher")
    sent = time.monotonic()
    assert launched.end().status == 128 + signal.SIGTERM
    assert time.monotonic() - sent < 10
