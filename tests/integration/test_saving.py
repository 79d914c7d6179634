import json
import os
import re
import signal

import pytest

from tests import jobs
from tests.integration.conftest import KILLED
from tests.unit.engine.test_writing import SMALL_DISK, has_small_disks

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("undisturbed")]
ASYNCHRONOUS = {"checkpoint__asynchronous": True}
# Leaves room for one checkpoint and a half, and for all of them once training goes on without.
FILL_UNTIL_TOLD = """
folder=$1; shift
head -c 500k /dev/zero > $folder/runs/filler
"$@" &
job=$!
while kill -0 $job 2> /dev/null; do
    grep -q "training goes on without" $folder/log && rm -f $folder/runs/filler
    sleep 0.1
done
wait $job; status=$?
cp $folder/runs/*/result.json $folder 2> /dev/null
exit $status
"""


def test_checkpoints_written_beside_training_resume_to_the_bit(runs, undisturbed_hash):
    job = runs.start(**KILLED, **ASYNCHRONOUS)
    runs.wait_for_step(14, job)
    job.kill()
    assert "resuming after step" in runs.succeed(**KILLED)
    assert runs.result()["parameter_hash"] == undisturbed_hash


@pytest.mark.long
def test_a_run_with_all_its_checkpoints_written_beside_training(runs, undisturbed_hash):
    runs.succeed(**KILLED, **ASYNCHRONOUS)
    result = runs.result()
    assert result["parameter_hash"] == undisturbed_hash
    assert result["checkpoints"]["written"] >= 32
    assert result["checkpoints"]["seconds_held_up"] > 0


@pytest.mark.long
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_fills_up(runs, tmp_path, undisturbed_hash, on_error, beside):
    if not has_small_disks(tmp_path):
        pytest.skip("no user namespaces: a small disk cannot be mounted here")
    (tmp_path / "runs").mkdir()
    settings = {**KILLED, "checkpoint__on_error": on_error, "checkpoint__asynchronous": beside}
    words = jobs.command(jobs.DEFAULT, 2, runs.words(**settings))
    script = ["sh", "-c", FILL_UNTIL_TOLD, "sh", str(tmp_path), *words]
    words = [*SMALL_DISK, str(tmp_path / "runs"), *script]
    outcome = jobs.Job(words, tmp_path / "log").wait(240)
    told = r"cannot be written by \S+ \(No space left on device; [\d.]+ of 1\.0 MiB are free"
    assert re.search(told, outcome.output), outcome.output[-3000:]
    assert "Traceback" not in outcome.output
    assert (outcome.status == 0) == (on_error == "continue")
    if on_error == "continue":
        assert (
            json.loads((tmp_path / "result.json").read_text())["parameter_hash"] == undisturbed_hash
        )
    else:
        assert "the one before is intact" in outcome.output


@pytest.mark.long
def test_a_signal_finishes_what_is_written_beside_training(runs, undisturbed_hash):
    job = runs.start(**KILLED, **ASYNCHRONOUS)
    runs.wait_for_step(4, job)
    os.kill(job.rank_pids()[0], signal.SIGTERM)
    outcome = job.wait()
    assert outcome.status == 0, outcome.output[-3000:]
    step = int(
        re.search(r"stopped by a signal after step (\d+), which is saved", outcome.output)[1]
    )
    checkpoints = runs.folder() / "checkpoints"
    assert (checkpoints / f"step-{step:08d}.json").exists()
    assert not list(checkpoints.glob("*.tmp"))
    assert f"resuming after step {step}\n" in runs.succeed(**KILLED)
    assert runs.result()["parameter_hash"] == undisturbed_hash
