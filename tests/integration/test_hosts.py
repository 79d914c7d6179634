"""Several machines: emulated hosts with addresses of their own, where netlab is at hand."""

import os
import re
import shutil

import pytest

from tests import jobs
from tests.integration.conftest import Runs

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


def test_payload_is_what_the_interface_carries(tmp_path):
    program = ["benchmarks/wire_bytes.py", "--steps", "5", "--layers", "4"]
    outcome = netlab(2, program, tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    ratios = [float(x) for x in re.findall(r"\| ([\d.]+) \|$", outcome.output, re.MULTILINE)]
    assert len(ratios) == 7
    assert all(1.0 <= ratio < 1.25 for ratio in ratios[:3])
    assert all(1.0 <= ratio < 2.0 for ratio in ratios[3:])  # small messages hold more framing
