import logging
import os

import pytest

from dgc.comm import launched
from dgc.comm.launched import LaunchError, kind_of_comm, refuse_elastic_torchrun, refuse_loners

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
BY_HAND = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nobody has started this process; set: what a launcher sets."""
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI", "SLURM_", "HOROVOD_", "PET_", *TORCHRUN)):
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        (TORCHRUN, "torch"), (BY_HAND, "torch"), ({"OMPI_COMM_WORLD_RANK": "0"}, "horovod"),
        ({"HOROVOD_RANK": "0"}, "horovod"), ({"RANK": "0"}, "horovod"), ({}, "horovod"),
        (TORCHRUN | {"OMPI_COMM_WORLD_RANK": "0"}, "torch"),  # mpirun starts torchrun
        (BY_HAND | {"OMPI_COMM_WORLD_RANK": "0"}, "horovod"),
    ],
)  # fmt: skip
def test_the_comm_is_that_of_the_launcher(variables, kind, environment, monkeypatch):
    monkeypatch.setattr(launched.importlib.util, "find_spec", lambda name: object())
    environment(variables)
    assert kind_of_comm() == kind


def test_who_is_alone_without_horovod_has_torch(monkeypatch):
    monkeypatch.setattr(launched.importlib.util, "find_spec", lambda name: None)
    assert kind_of_comm() == "torch"


@pytest.mark.parametrize(
    ("variables", "remedy"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4.*launch/mpirun.sh"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE is 4"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, "launch/slurm.sh instead of srun"),
        (TORCHRUN, "WORLD_SIZE is 4.*TorchComm"),
    ],
)
def test_one_of_several_that_is_alone_stops(variables, remedy, environment):
    environment(variables)
    with pytest.raises(LaunchError, match=remedy):
        refuse_loners(1, "Horovod")
    refuse_loners(4, "Horovod")


def test_who_may_be_meant_to_be_alone_is_only_told(environment, caplog):
    environment({"SLURM_NTASKS": "8"})  # in a batch script, before srun
    with caplog.at_level(logging.WARNING):
        refuse_loners(1, "Horovod")
        assert "SLURM_NTASKS is 8" in caplog.text
        caplog.clear()
        environment({"OMPI_COMM_WORLD_SIZE": "1"})  # mpirun -np 1 in it
        refuse_loners(1, "Horovod")
    assert not caplog.text


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["torchrun", "--nnodes", "1:4", "train.py"], True), (["torchrun", "--nnodes=2"], False),
        (["torchrun", "--nnodes=1:2", "train.py"], True), (["torchrun", "--nnodes", "2:2"], False),
        (["torchrun", "train.py", "1:4"], False),
    ],
)  # fmt: skip
def test_torchruns_elastic_jobs_are_refused(words, is_refused, environment, monkeypatch):
    words = "\0".join(words)
    monkeypatch.setattr(launched.Path, "read_text", lambda path: words)
    refuse_elastic_torchrun()
    environment(TORCHRUN)
    if is_refused:
        with pytest.raises(LaunchError, match=r"--nnodes \d:\d.*residuals.*--max-restarts"):
            refuse_elastic_torchrun()
    else:
        refuse_elastic_torchrun()
        environment({"PET_NNODES": "1:2"})
        if "--nnodes" not in words:
            with pytest.raises(LaunchError):
                refuse_elastic_torchrun()
