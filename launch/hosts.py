"""Which hosts of a job still answer, and the command that starts it on them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ANSWER_WITHIN_S = 10
_HERE = ("localhost", "127.0.0.1")


def narrowed(command: Sequence[str], min_ranks: int) -> tuple[list[str], str | None]:
    """Return a command for the hosts that answer now, and why it cannot be started, if so.

    Of a launcher's command, the word after -np is the number of ranks, and that after -H, if it is
    there, names hosts as a:8,b:8; that after -hostfile a file of lines "a slots=8". A file that
    does not give every host's slots is left to mpirun.
    """
    command = list(command)
    head = command[: command.index("python") if "python" in command else len(command)]
    slots, where = [], next((flag for flag in ("-H", "-hostfile") if flag in head), None)
    if where is not None:
        at = head.index(where) + 1
        slots = _of_words(head[at]) if where == "-H" else _of_file(head[at])
    if not slots:
        return command, None
    with ThreadPoolExecutor(min(64, len(slots))) as threads:
        answers = list(threads.map(lambda slot: answers_now(slot[0]), slots))
    left = [slot for slot, is_there in zip(slots, answers, strict=True) if is_there]
    gone = [host for (host, _), is_there in zip(slots, answers, strict=True) if not is_there]
    if not gone:
        return command, None
    num_ranks = sum(count for _, count in left)
    if "-np" in head:
        num_ranks = min(num_ranks, int(head[head.index("-np") + 1]))
    if num_ranks < max(1, min_ranks):
        return command, (
            f"{', '.join(gone)} do not answer, and the others have {num_ranks} ranks; allowed: "
            f"{max(1, min_ranks)} or more (--min-np)"
        )
    command[at - 1 : at + 1] = ["-H", ",".join(f"{host}:{count}" for host, count in left)]
    if "-np" in head:
        command[head.index("-np") + 1] = str(num_ranks)
    return command, None


def _of_words(words: str) -> list[tuple[str, int]]:
    """Return hosts and slots of "a:8,b:8"; without a number it is one."""
    parts = [word.rpartition(":") for word in words.split(",")]
    return [(name, int(count)) if colon else (count, 1) for name, colon, count in parts]


def _of_file(path: str) -> list[tuple[str, int]]:
    """Return hosts and slots of a host file; [] if it does not give them all, or users."""
    try:
        lines = [line.partition("#")[0].strip() for line in Path(path).read_text().splitlines()]
    except OSError:
        return []
    found = [re.match(r"([^\s@]+)\s.*?slots\s*=\s*(\d+)", line) for line in lines if line]
    return [(match[1], int(match[2])) for match in found if match] if all(found) else []


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
