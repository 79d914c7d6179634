"""Which launcher started this process, and as one of how many, by the environment variables."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from pathlib import Path

_log = logging.getLogger(__name__)

KINDS = ("horovod", "torch")
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_TORCHS_OWN = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
_MPIS_AND_HOROVODS = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_NUMBERS_OF_PROCESSES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# Set in jobs of which this may be one process of many.
_NUMBERS_OF_A_JOB = ("SLURM_NTASKS", "WORLD_SIZE")


class LaunchError(RuntimeError):
    """The job was started in a way that cannot work; the message says how it can."""


def kind_of_comm() -> str:
    """Return "torch" where torchrun, or its variables, started this process; else "horovod".

    A process that nobody started is alone, and Horovod's where that is installed.
    """
    names = os.environ.keys()
    if _TORCHRUN in names:  # even in a job of MPI, which may have started one torchrun a machine
        return "torch"
    if not names.isdisjoint(_MPIS_AND_HOROVODS):
        return "horovod"
    if names >= set(_TORCHS_OWN) or importlib.util.find_spec("horovod") is None:
        return "torch"
    return "horovod"


def refuse_loners(world_size: int, made: str) -> None:
    """Stop where one of several processes finds itself alone. made: what found that.

    Raises: LaunchError where the environment is that of one of several processes; where it only
        says that there may be several, there is a warning.
    """
    if world_size > 1:
        return
    is_by_torch = os.environ.keys() >= set(_TORCHS_OWN)
    certain = [*(["WORLD_SIZE"] if is_by_torch else []), *_NUMBERS_OF_PROCESSES]
    name = next((name for name in certain if _number(name)), None)
    if name is not None:  # the innermost launcher is right, whatever the others say
        if _number(name) > 1:
            raise LaunchError(f"{_alone(name, made)} {_remedy(is_by_torch)}")
        return
    for name in _NUMBERS_OF_A_JOB:
        if _number(name) > 1:
            _log.warning("%s If there are to be several: %s", _alone(name, made), _remedy(False))
            return


def _alone(name: str, made: str) -> str:
    return (
        f"this process is alone as {made} finds it, but {name} is {os.environ[name]}: each of "
        f"{os.environ[name]} processes would train by itself, all in the same run's folder."
    )


def _remedy(is_by_torch: bool) -> str:
    if is_by_torch:
        return "Under torchrun use TorchComm() (train.py: --comm torch)"
    return (
        "Start them with horovodrun, with the mpirun of this environment (launch/mpirun.sh; under "
        "SLURM launch/slurm.sh instead of srun), or with torchrun; launch/doctor tells what is here"
    )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def refuse_elastic_torchrun() -> None:
    """Stop in a job of torchrun whose number of machines may change.

    Raises: LaunchError. What torchrun was asked for it tells nobody; it is read from its own words.
    """
    if _TORCHRUN not in os.environ:
        return
    nodes = _asked_for_nodes() or os.environ.get("PET_NNODES", "1")
    least, _, most = nodes.partition(":")
    if most and most != least:
        raise LaunchError(
            f"this is an elastic job of torchrun (--nnodes {nodes}): its ranks come and go, while "
            f"each rank of ours keeps residuals of its own, which are part of the model's state "
            f"and would be lost or doubled. Start a fixed number: --nnodes {most}. With "
            f"--max-restarts N a job of as many ranks starts again, from its newest checkpoint"
        )


def _asked_for_nodes() -> str | None:
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return None
    for word, following in itertools.pairwise(words):
        option, equals, value = word.replace("_", "-").partition("=")
        if option in ("--nnodes", "-nnodes"):
            return value if equals else following
    return None
