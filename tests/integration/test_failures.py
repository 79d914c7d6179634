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
from tests.integration.conftest import SPARSE

pytestmark = pytest.mark.integration
FAILING = [*SPARSE, "tests/integration/failing.py"]


@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_an_exception_on_one_rank_ends_the_job_with_its_message(runs, launcher):
    outcome = runs.run(configs=FAILING, launcher=launcher, timeout=60)
    assert outcome.status != 0
    assert "rank 1 failed and ends the job" in outcome.output
    assert "cannot be read" in outcome.output


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun --gloo"])
def test_a_nan_on_one_rank_costs_one_step_and_is_told_once(runs, launcher):
    configs = [*SPARSE, "tests/integration/spoiling.py"]
    settings = {"train__num_epochs": 2, "data__samples_per_epoch": 512}
    outcome = runs.run(configs=configs, launcher=launcher, **settings)
    assert outcome.status == 0, outcome.output[-5000:]
    assert outcome.output.count("step undone on all ranks: the gradient of") == 1
    assert outcome.output.count("steps undone so far: 1") == 2  # in both epochs' lines
    result = runs.result()
    assert (result["steps"], result["skipped_steps"]) == (16, 1)
    assert all(math.isfinite(v) for m in result["metrics"].values() for v in m.values())
    for part in (runs.folder() / "checkpoints").glob("*.rank-*.pt"):
        buffers = torch.load(part, weights_only=True)["buffers"]
        assert all(buffer.isfinite().all() for buffer in buffers.values())
    events = read_scalars(runs.folder())
    assert [value for _, value in events["train/skipped_steps"]] == [1]
    assert len(events["loss/train"]) == 15


@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
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


def wait_for_step(folder, step, job, timeout=90):
    """Wait until a checkpoint of this step is whole; every_steps makes them within epochs."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if list(folder.glob(f"*/checkpoints/step-{step:08d}.json")):
            return
        assert job.is_running, "the run ended before it could be killed"
        time.sleep(0.005)
    pytest.fail(f"no checkpoint of step {step} after {timeout} s")


@pytest.mark.parametrize("launcher", jobs.LAUNCHERS)
def test_a_rank_killed_in_mid_epoch_ends_the_job_and_can_be_resumed(
    runs, tmp_path, launcher, undisturbed_hash
):
    settings = {"checkpoint__every_steps": 2, "train__num_epochs": 4}
    job = runs.start(launcher=launcher, **settings)
    wait_for_step(tmp_path / "runs", 10, job)
    os.kill(rank_processes(job)[-1], signal.SIGKILL)
    outcome = job.wait(60)
    assert outcome.status != 0
    assert re.search(r"signal 9|SIGKILL|Killed|code (137|-9)", outcome.output), outcome.output
    resumed = runs.run(launcher=launcher, **settings)
    assert resumed.status == 0, resumed.output[-5000:]
    assert "resuming after step" in resumed.output
    assert runs.result()["parameter_hash"] == undisturbed_hash


@pytest.mark.parametrize("step", [4, 8, 22])
def test_a_job_killed_at_any_moment_resumes_to_the_same_bits(
    runs, tmp_path, step, undisturbed_hash
):
    settings = {"checkpoint__every_steps": 2, "train__num_epochs": 4}
    job = runs.start(**settings)
    wait_for_step(tmp_path / "runs", step, job)
    if step == 4:
        check_that_a_second_job_is_refused(runs, job, settings)
    job.kill()
    resumed = runs.run(**settings)
    assert resumed.status == 0, resumed.output[-5000:]
    assert "resuming after step" in resumed.output
    assert runs.result()["parameter_hash"] == undisturbed_hash
    assert runs.result()["steps"] == 32


def check_that_a_second_job_is_refused(runs, job, settings):
    ranks = rank_processes(job)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    before = sorted(runs.folder().rglob("*"))
    second = runs.run(**settings)
    assert second.status != 0
    holder = re.search(r"is in use: process (\d+) on", second.output)
    assert int(holder[1]) in ranks, second.output
    assert sorted(runs.folder().rglob("*")) == before


def test_a_kill_at_a_random_time_with_all_the_machinery_is_resumed(runs, tmp_path):
    """Accumulation, loader processes, a schedule by steps, clipping, and several kills."""
    settings = {
        "checkpoint__every_steps": 1,
        "train__num_epochs": 2,
        "train__batch_size_per_rank": 16,
        "train__micro_batches_per_step": 2,
        "train__schedule_lr_per": "step",
        "data__num_workers_per_rank": 1,
        "dgc__clip_norm": 1.0,
    }
    assert runs.run(runs="undisturbed", **settings).status == 0
    moments = random.Random(0)
    for step in (2, 9):
        job = runs.start(**settings)
        wait_for_step(tmp_path / "runs", step, job)
        time.sleep(moments.random() / 2)
        job.kill()
    resumed = runs.run(**settings)
    assert resumed.status == 0, resumed.output[-5000:]
    assert runs.result()["parameter_hash"] == runs.result("undisturbed")["parameter_hash"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(runs):
    settings = {"checkpoint__every_steps": 2, "train__num_epochs": 4}
    assert runs.run(**settings).status == 0
    expected = runs.result()["parameter_hash"]
    folder = runs.folder() / "checkpoints"
    part = max(folder.glob("*.rank-0001-of-0002.pt"))
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    outcome = runs.run(**settings)
    assert outcome.status == 0, outcome.output[-5000:]
    assert "skipped a damaged checkpoint" in outcome.output
    assert "its SHA-256 differs" in outcome.output
    assert runs.result()["parameter_hash"] == expected


def test_another_number_of_ranks_is_told_what_to_do(runs):
    assert runs.run().status == 0
    two = runs.folder()
    one = two.with_name(two.name.replace(".np2", ".np1"))
    two.rename(one)
    outcome = runs.run(num_ranks=1)
    assert outcome.status != 0
    assert "was written by 2 ranks and this job has 1" in outcome.output


def rank_processes(job):
    """The pids of train.py's ranks, without launchers written in Python."""
    found = []
    for pid in job.rank_pids():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode().split("\0")
        if jobs.is_our_python(words[0]) and "train.py" in words[1:3]:  # torchrun adds -u
            found.append(pid)
    return found
