"""What happens when a rank fails, is killed, or was started differently: never a hang."""

import math
import os
import random
import re
import signal
import time

import pytest
import torch

from benchmarks.tables import read_scalars
from tests import jobs
from tests.integration.conftest import KILLED, SMALL, SPARSE
from tests.long import all_but_long

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("undisturbed")]
FAILING = [*SMALL, "tests/integration/failing.py"]


def of_launchers(*short):
    """Every launcher, those that are not named here as campaigns."""
    return pytest.mark.parametrize("launcher", all_but_long(short, jobs.LAUNCHERS))


@of_launchers("mpirun", "torchrun")
def test_an_exception_on_one_rank_ends_the_job_with_its_message(runs, launcher):
    output = runs.fail(configs=FAILING, launcher=launcher, timeout=60)
    assert "rank 1 failed and ends the job" in output
    assert "cannot be read" in output


@of_launchers("horovodrun --gloo")
def test_a_nan_on_one_rank_costs_one_step_and_is_told_once(runs, launcher):
    configs = [*SPARSE, "tests/integration/perceptron.py", "tests/integration/spoiling.py"]
    settings = {"train__num_epochs": 2, "data__samples_per_epoch": 512}
    output = runs.succeed(configs=configs, launcher=launcher, **settings)
    assert output.count("step undone on all ranks: the gradient of") == 1
    assert output.count("steps undone so far: 1") == 2  # in both epochs' lines
    result = runs.result()
    assert (result["steps"], result["skipped_steps"]) == (16, 1)
    assert all(math.isfinite(v) for m in result["metrics"].values() for v in m.values())
    for part in (runs.folder() / "checkpoints").glob("*.rank-*.pt"):
        buffers = torch.load(part, weights_only=True)["buffers"]
        assert all(buffer.isfinite().all() for buffer in buffers.values())
    events = read_scalars(runs.folder())
    assert [value for _, value in events["train/skipped_steps"]] == [1]
    assert len(events["loss/train"]) == 15


@of_launchers("mpirun")
def test_ranks_with_different_settings_are_told_where(launcher, tmp_path):
    names = {"horovodrun --gloo": "HOROVOD_RANK", "torchrun": "RANK"}
    name = names.get(launcher, "OMPI_COMM_WORLD_RANK")
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.argv = {['train.py', *SPARSE, '--runs', str(tmp_path / 'runs')]!r}\n"
        f"sys.argv += ['--configs.train.optimizer.lr', '0.0' + os.environ['{name}']]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    outcome = jobs.run(launcher, 2, [str(script)], tmp_path / "log", timeout=60)
    assert outcome.status != 0
    assert "rank 0 and rank 1 differ" in outcome.output
    assert "configs.train.optimizer.lr: 0.0 against 0.01" in outcome.output


def kill_a_rank(job):
    """Kill the last rank; the job must end by itself, and say so."""
    os.kill(rank_processes(job)[-1], signal.SIGKILL)
    outcome = job.wait(60)
    assert outcome.status != 0
    assert re.search(r"signal 9|SIGKILL|Killed|code (137|-9)", outcome.output), outcome.output


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(runs, undisturbed_hash):
    """First all of it, in the first epoch; then, taken up, one of its ranks in another."""
    job = runs.start(**KILLED)
    runs.wait_for_step(4, job)
    check_that_a_second_job_is_refused(runs, job)
    job.kill()
    job = runs.start(**KILLED)
    runs.wait_for_step(22, job)
    kill_a_rank(job)
    result = runs.resume(**KILLED)
    assert result["parameter_hash"] == undisturbed_hash
    assert result["steps"] == 64


def check_that_a_second_job_is_refused(runs, job):
    ranks = rank_processes(job)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    before = sorted(runs.folder().rglob("*"))
    holder = re.search(r"is in use: process (\d+) on", runs.fail(**KILLED))
    assert int(holder[1]) in ranks
    assert sorted(runs.folder().rglob("*")) == before


@of_launchers()
def test_a_rank_killed_in_mid_epoch_ends_the_job_and_can_be_resumed(
    runs, launcher, undisturbed_hash
):
    job = runs.start(launcher=launcher, **KILLED)
    runs.wait_for_step(10, job)
    kill_a_rank(job)
    assert runs.resume(launcher=launcher, **KILLED)["parameter_hash"] == undisturbed_hash


@pytest.mark.long
@pytest.mark.parametrize("step", [2, 8, 10, 16, 30, 62])
def test_a_job_killed_at_any_moment_resumes_to_the_same_bits(runs, step, undisturbed_hash):
    job = runs.start(**KILLED)
    runs.wait_for_step(step, job)
    job.kill()
    assert runs.resume(**KILLED)["parameter_hash"] == undisturbed_hash


@pytest.mark.long
def test_kills_at_random_times_with_all_the_machinery_are_resumed(runs):
    """Accumulation, loader processes, a schedule by steps, clipping, and several kills."""
    settings = {
        "checkpoint__every_steps": 1,
        "train__num_epochs": 8,
        "train__batch_size_per_rank": 16,
        "train__micro_batches_per_step": 2,
        "train__schedule_lr_per": "step",
        "data__num_workers_per_rank": 1,
        "dgc__clip_norm": 1.0,
    }
    runs.succeed(runs="undisturbed", **settings)
    moments = random.Random(0)
    for step in (2, 9, 20, 33):
        job = runs.start(**settings)
        runs.wait_for_step(step, job)
        time.sleep(moments.random() / 10)
        job.kill()
    result = runs.resume(**settings)
    assert result["parameter_hash"] == runs.result("undisturbed")["parameter_hash"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, undisturbed_hash):
    part = max((finished.folder() / "checkpoints").glob("*.rank-0001-of-0002.pt"))
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    output = finished.succeed(**KILLED)
    assert "skipped a damaged checkpoint" in output
    assert "its SHA-256 differs" in output
    assert finished.result()["parameter_hash"] == undisturbed_hash


def test_a_run_of_two_ranks_goes_on_with_one_in_the_midst_of_an_epoch(finished):
    """In a folder that an earlier version named after its ranks. Step 62 of 64 was the last."""
    two = finished.folder()
    (two / "result.json").unlink()
    (two / "checkpoints/step-00000064.json").unlink()
    two.rename(two.with_name(f"{two.name}.np2"))
    scored = finished.succeed("--evaluate", num_ranks=1, **KILLED)
    assert f"(taking {two.name}.np2, as there is no {two.name})" in scored
    assert "acc/test_top1:" in scored
    output = finished.succeed(num_ranks=1, **KILLED)
    assert "resuming after step 62" in output
    assert "now with 1 ranks instead of 2" in output
    assert "samples of a step: 64 -> 32" in output
    assert "steps left of this epoch: 4 of now 16 an epoch" in output
    result = finished.result()
    assert (result["steps"], result["world_size"]) == (66, 1)
    assert result["metrics"]["acc/test_top1"]["last"] > 80


@pytest.mark.long
def test_more_epochs_are_refused_where_the_rate_would_have_been_another(finished):
    output = finished.fail(**{**KILLED, "train__num_epochs": 9})
    assert "configs.train.num_epochs: 8 against 9" in output


def rank_processes(job):
    """The pids of train.py's ranks, without launchers written in Python."""
    found = []
    for pid in job.rank_pids():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode().split("\0")
        if jobs.is_our_python(words[0]) and "train.py" in words[1:3]:  # torchrun adds -u
            found.append(pid)
    return found
