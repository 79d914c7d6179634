"""Which hosts of a job still answer, and the command that starts it on them."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_ANSWER_WITHIN_S = 10
_HERE = ("localhost", "127.0.0.1")


def narrowed(command: Sequence[str], min_ranks: int) -> tuple[list[str], str | None]:
    """Return a command for the hosts that answer now, and why it cannot be started, if so.

    Of a launcher's command, the word after -np is the number of ranks, and that after -H, if it is
    there, names hosts as a:8,b:8. Hosts in a file are left to mpirun.
    """
    command = list(command)
    end = command.index("python") if "python" in command else len(command)
    head = command[:end]
    if "-H" not in head or "-np" not in head:
        return command, None
    hosts, ranks = head.index("-H") + 1, head.index("-np") + 1
    slots = [_slots(host) for host in command[hosts].split(",")]
    with ThreadPoolExecutor(min(64, len(slots))) as threads:
        answers = list(threads.map(lambda slot: answers_now(slot[0]), slots))
    left = [slot for slot, is_there in zip(slots, answers, strict=True) if is_there]
    num_ranks = min(int(command[ranks]), sum(count for _, count in left))
    gone = [host for (host, _), is_there in zip(slots, answers, strict=True) if not is_there]
    if not gone:
        return command, None
    if num_ranks < max(1, min_ranks):
        return command, (
            f"{', '.join(gone)} do not answer, and the others have {num_ranks} ranks; allowed: "
            f"{max(1, min_ranks)} or more (--min-np)"
        )
    command[hosts] = ",".join(f"{host}:{count}" for host, count in left)
    command[ranks] = str(num_ranks)
    return command, None


def _slots(host: str) -> tuple[str, int]:
    name, colon, count = host.rpartition(":")
    return (name, int(count)) if colon else (host, 1)


def answers_now(host: str) -> bool:
    """Tell whether a host runs a command for us within a few seconds, by the shell mpirun uses."""
    name = socket.gethostname()
    if host in (*_HERE, name, name.partition(".")[0], socket.getfqdn()):
        return True
    try:
        done = subprocess.run(
            [*_remote_shell(host), "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=_ANSWER_WITHIN_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _remote_shell(host: str) -> list[str]:
    """Return the words that begin a command on a host: mpirun's agent, or SLURM's within a job."""
    agent = shlex.split(os.environ.get("OMPI_MCA_plm_rsh_agent", ""))
    if not agent and "SLURM_JOB_ID" in os.environ:  # where nodes may refuse ssh
        return ["srun", "--overlap", "--nodes", "1", "--ntasks", "1", "--nodelist", host]
    if not agent or agent[0] == "ssh":
        agent = [*(agent or ["ssh"]), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
    return [*agent, host]
