"""Several machines: emulated hosts with addresses of their own, where netlab is at hand."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.integration.conftest import KILLED, Runs

pytestmark = pytest.mark.integration
NETLAB = jobs.ROOT.parent / "shared" / "netlab"

if not (NETLAB.exists() and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")):
    pytest.skip("needs ../shared/netlab, root and iproute2", allow_module_level=True)


# One torchrun a host, as one starts them by hand; mpirun brings them there, as ssh would.
TORCHRUN = """
address=$(ip -4 -o address show eth0 | awk '{print $4}')
exec torchrun --nnodes 4 --node-rank $OMPI_COMM_WORLD_RANK --nproc-per-node 1 \
    --master-addr ${address%.*}.1 "$@"
"""


def netlab(hosts, program, log, start=(jobs.sys.executable,)):
    words = [str(NETLAB), str(hosts), "1gbit", "--", *start, *program]
    return jobs.Job(words, log).wait(200)


@pytest.mark.parametrize("start", [(jobs.sys.executable,), ("bash", "-c", TORCHRUN, "torchrun")])
def test_four_hosts_train_replicas_that_are_equal_to_the_bit(start, tmp_path):
    """The run itself compares its ranks' hashes after each epoch, and stops if they differ."""
    runs = Runs(tmp_path)
    outcome = netlab(4, runs.words(), tmp_path / "log", start)
    assert outcome.status == 0, outcome.output[-5000:]
    result = runs.result()
    assert result["world_size"] == 4
    assert re.fullmatch("[0-9a-f]{64}", result["parameter_hash"])


def cut(netlab_pid, host):
    """Let the switch drop all that a host sends or gets; return how to mend it."""
    words = ["bridge", "-n", f"nl{netlab_pid}-sw", "link", "set", "dev", f"p{host}", "state"]
    subprocess.run([*words, "0"], check=True)
    return lambda: subprocess.run([*words, "3"], check=True)


@pytest.mark.long
def test_a_link_that_is_cut_for_5_s_changes_no_bit(tmp_path):
    runs = Runs(tmp_path)
    runs.succeed(runs="straight", num_ranks=3, **KILLED)
    program = runs.words(**KILLED)
    words = [str(NETLAB), "3", "1gbit", "--", jobs.sys.executable, *program]
    job = jobs.Job(words, tmp_path / "log")
    runs.wait_for_step(14, job)
    mend = cut(job.pid, 2)
    time.sleep(5)
    assert job.is_running
    mend()
    outcome = job.wait(150)
    assert outcome.status == 0, outcome.output[-5000:]
    assert runs.result()["parameter_hash"] == runs.result("straight")["parameter_hash"]


@pytest.mark.long
def test_a_link_that_stays_cut_ends_the_job_with_the_name_of_the_rank_behind_it(
    tmp_path, monkeypatch
):
    """Under our launcher, as mpirun alone waits for the daemon of the host that is cut off."""
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "5")
    runs = Runs(tmp_path)
    limit = ["-x", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", jobs.sys.executable]
    netlab = [str(NETLAB), "3", "1gbit", "--", *limit, *runs.words(**KILLED)]
    supervised = [jobs.sys.executable, "-m", "launch.supervise", "--", *netlab]
    job = jobs.Job(supervised, tmp_path / "log")
    runs.wait_for_step(14, job)
    (child,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    cut(child, 2)
    outcome = job.wait(100)
    assert outcome.status != 0
    assert re.search(r"Missing: rank 1 on h2", outcome.output), outcome.output[-5000:]
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert f"nl{child}-" not in left, "the network of the job was left behind"


def test_payload_is_what_the_interface_carries(tmp_path):
    program = ["benchmarks/wire_bytes.py", "--steps", "5", "--layers", "4"]
    outcome = netlab(2, program, tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    ratios = [float(x) for x in re.findall(r"\| ([\d.]+) \|$", outcome.output, re.MULTILINE)]
    assert len(ratios) == 7
    assert all(1.0 <= ratio < 1.25 for ratio in ratios[:3])
    assert all(1.0 <= ratio < 2.0 for ratio in ratios[3:])  # small messages hold more framing
