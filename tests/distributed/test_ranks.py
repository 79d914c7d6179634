"""The collectives and the exchange on real ranks, under every way of starting them."""

from pathlib import Path

import pytest

from tests import jobs
from tests.long import all_but_long, long

pytestmark = pytest.mark.distributed
PROGRAM = str(Path(__file__).with_name("check_ranks.py"))


@pytest.mark.parametrize(
    ("launcher", "num_ranks"),
    [long("horovodrun", 2), long("horovodrun --gloo", 2), long("mpirun", 2), ("mpirun", 4),
     long("horovodrun --gloo", 4), ("torchrun", 2), long("torchrun", 4)],
)  # fmt: skip
def test_ranks_agree_to_the_bit(launcher, num_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "1")  # for islands on one node
    controller = {"horovodrun --gloo": "gloo", "torchrun": "torch"}.get(launcher, "mpi")
    outcome = jobs.run(launcher, num_ranks, [PROGRAM, controller], tmp_path / "log")
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(num_ranks):
        assert f"rank {rank} of {num_ranks} agrees" in outcome.output


STUCK = """
import torch
from dgc.comm.job import job
with job() as comm:
    comm.barrier()
    comm.all_reduce_async(torch.ones(3), f"only rank {comm.rank} asks for this").wait()
"""


@pytest.mark.parametrize("launcher", all_but_long(["mpirun"], jobs.LAUNCHERS))
def test_ranks_that_wait_for_each_other_give_up_with_a_message(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "5")
    program = tmp_path / "stuck.py"
    program.write_text(STUCK)
    outcome = jobs.run(launcher, 2, [str(program)], tmp_path / "log", timeout=60)
    assert outcome.status != 0
    assert "waited 5 s for the other ranks to join collective 'only rank" in outcome.output
