"""Collectives in pieces, several comms and lives of Horovod's and torch's, on real ranks."""

import re
from pathlib import Path

import pytest

from tests import jobs
from tests.long import long

pytestmark = pytest.mark.distributed
FOLDER = Path(__file__).parent
FUSION = "Horovod's tensor fusion is on: with 3 ranks"


@pytest.mark.parametrize(
    ("launcher", "num_ranks", "begun_by"),
    [("mpirun", 2, "comm"), long("horovodrun --gloo", 3, "comm"), ("mpirun", 3, "person"),
     ("torchrun", 3, "comm"), long("torchrun", 2, "person")],
)  # fmt: skip
def test_any_size_any_number_of_comms_in_any_life(
    launcher, num_ranks, begun_by, tmp_path, monkeypatch
):
    for name in ("HOROVOD_FUSION_THRESHOLD", "HOROVOD_DYNAMIC_PROCESS_SETS"):
        monkeypatch.delenv(name, raising=False)
    what = "torch" if launcher == "torchrun" else "horovod"
    program = [str(FOLDER / "check_comm.py"), what, begun_by]
    outcome = jobs.run(launcher, num_ranks, program, tmp_path / "log", timeout=240)
    assert outcome.status == 0, outcome.output[-5000:]
    assert outcome.output.count("rank passed every check") == num_ranks
    warned = int((what, begun_by) == ("horovod", "person"))  # once, of several HorovodComms
    assert outcome.output.count(FUSION) == warned


DIFFERENT_MODELS = """
import torch
from dgc import DistributedOptimizer
from dgc.comm.job import COMMS
from dgc.comm.launched import kind_of_comm
Comm = COMMS[kind_of_comm()]
models = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
optimizers = [
    DistributedOptimizer(
        torch.optim.SGD(m.parameters(), lr=0.1), m.named_parameters(), comm=Comm()
    )
    for m in models
]
rank = optimizers[0].comm.rank
models[rank](torch.ones(1, 4)).sum().backward()
optimizers[rank].step()
"""


@pytest.mark.parametrize("launcher", ["horovodrun --gloo", long("torchrun")])
def test_ranks_that_step_different_models_stop_with_a_message(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "5")
    program = tmp_path / "different.py"
    program.write_text(DIFFERENT_MODELS)
    log = tmp_path / "log"
    outcome = jobs.run(launcher, 2, [str(program)], log, timeout=120)
    assert outcome.status != 0
    assert re.search(r"for the other ranks to join collective '(replicas|exchange)", outcome.output)


UNEQUAL = """
import horovod.torch as hvd
from dgc.comm import HorovodComm
comm = HorovodComm()
for _ in range(2 - comm.rank):
    comm.barrier("a batch")
hvd.join()
"""


def test_join_ends_the_job_with_the_remedy(tmp_path):
    program = tmp_path / "unequal.py"
    program.write_text(UNEQUAL)
    outcome = jobs.run("mpirun", 2, [str(program)], tmp_path / "log", timeout=120)
    assert outcome.status != 0
    assert "Give every rank the same number of batches" in outcome.output


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun --gloo", "torchrun"])
def test_more_than_two_gib(launcher, tmp_path):
    """Takes 9 to 12 GiB of memory."""
    program = [str(FOLDER / "check_large_messages.py")]
    outcome = jobs.run(launcher, 2, program, tmp_path / "log", timeout=800)
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(2):
        assert f"rank {rank} passed check_gather" in outcome.output
