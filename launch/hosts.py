"""Which hosts of a job still answer, and the command that starts it on them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ANSWER_WITHIN_S = 10
_HERE = ("localhost", "127.0.0.1")


def narrowed(
    command: Sequence[str], min_ranks: int, unasked: Collection[str] = ()
) -> tuple[list[str], str | None]:
    """Return a command for the hosts that answer now, and why it cannot be started, if so.

    Of a launcher's command, the word after -np is the number of ranks, and that after -H, if it is
    there, names hosts as a:8,b:8; that after -hostfile a file of lines "a slots=8". A file that
    does not give every host's slots is left to mpirun.
    Args: unasked: hosts that are taken to be there.
    """
    command = list(command)
    flag, slots = _hosts_of(command)
    gone = [host for host in _silent([host for host, _ in slots]) if host not in unasked]
    if not gone:
        return command, None
    head = _head(command)
    left = [slot for slot in slots if slot[0] not in gone]
    num_ranks = sum(count for _, count in left)
    if "-np" in head:
        num_ranks = min(num_ranks, int(head[head.index("-np") + 1]))
    if num_ranks < max(1, min_ranks):
        return command, (
            f"{', '.join(gone)} do not answer, and the others have {num_ranks} ranks; allowed: "
            f"{max(1, min_ranks)} or more (--min-np)"
        )
    at = head.index(flag)
    command[at : at + 2] = ["-H", ",".join(f"{host}:{count}" for host, count in left)]
    if "-np" in head:
        command[head.index("-np") + 1] = str(num_ranks)
    return command, None


def silent_hosts(command: Sequence[str]) -> list[str]:
    """Return which hosts of a launcher's command do not answer now."""
    return _silent([host for host, _ in _hosts_of(command)[1]])


def _head(command: Sequence[str]) -> list[str]:
    """Return the words of a command before the program's."""
    return list(command[: command.index("python") if "python" in command else len(command)])


def _hosts_of(command: Sequence[str]) -> tuple[str, list[tuple[str, int]]]:
    """Return the option that names a command's hosts, and these with their slots."""
    head = _head(command)
    for flag, read in (("-H", _of_words), ("-hostfile", _of_file)):
        if flag in head:
            return flag, read(head[head.index(flag) + 1])
    return "", []


def _silent(hosts: list[str]) -> list[str]:
    if not hosts:
        return []
    with ThreadPoolExecutor(min(64, len(hosts))) as threads:
        answers = list(threads.map(answers_now, hosts))
    return [host for host, is_there in zip(hosts, answers, strict=True) if not is_there]


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
    found = [re.match(r"([^\s@]+)\s.*?(?<![\w-])slots\s*=\s*(\d+)", line) for line in lines if line]
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
