"""Starting real jobs for tests: horovodrun with either controller, mpirun, and torchrun."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HAS_HOROVOD = importlib.util.find_spec("horovod") is not None
LAUNCHERS = ("horovodrun", "horovodrun --gloo", "mpirun", "torchrun")
DEFAULT = "mpirun" if HAS_HOROVOD else "torchrun"


def command(launcher: str, num_ranks: int, program: Sequence[str]) -> list[str]:
    """Return the words that start `python <program>` on this machine."""
    python = [sys.executable, *program]
    if launcher == "mpirun":
        as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        quiet = ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "--bind-to", "none"]
        return ["mpirun", *as_root, *quiet, "-np", str(num_ranks), *python]
    if launcher == "torchrun":  # on a port of its own; this host's name need not lead anywhere
        alone = ["--standalone", "--local-addr=127.0.0.1"]
        return ["torchrun", *alone, f"--nproc-per-node={num_ranks}", "--no-python", *python]
    return [*launcher.split(), "-np", str(num_ranks), "-H", f"localhost:{num_ranks}", *python]


def is_our_python(word: str) -> bool:
    """Whether a command begins with this environment's Python, which has several names."""
    return Path(word).parent == BIN and Path(word).name.startswith("python")


@dataclass
class Outcome:
    status: int
    output: str


class Job:
    """A job under way, in a process group of its own."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._log = log
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        others = filter(None, [os.environ.get("PYTHONPATH")])  # e.g. of wheels laid in a folder
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each rank would compile all modules anew
        environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "parsimony-tests")
        with log.open("w") as file:
            self._process = subprocess.Popen(
                words, cwd=ROOT, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The launcher's."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout: float = 120) -> Outcome:
        """Return how it ended; a job that hangs is killed and fails the test."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self._log.read_text()[-5000:]}")
        finally:
            self.kill()
        return Outcome(status, self._log.read_text())

    def kill(self) -> None:
        """kill -9 every process of the job; ranks sit in process groups of their own."""
        for pid in [*self.rank_pids(), self._process.pid]:
            for send in (os.killpg, os.kill):
                try:
                    send(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
        self._process.wait()

    def rank_pids(self) -> list[int]:
        """Return the Python processes below the launcher."""
        children: dict[int, list[int]] = {}
        names: dict[int, str] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                text = stat.read_text()
                words = Path(stat.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            pid, parent = int(stat.parent.name), int(text.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
            names[pid] = words[0].decode()
        below, found = [self._process.pid], []
        while below:
            pid = below.pop()
            below += children.get(pid, [])
            if pid != self._process.pid and is_our_python(names.get(pid, "")):
                found.append(pid)
        return found


def start(launcher: str, num_ranks: int, program: Sequence[str], log: Path) -> Job:
    """Start a job; without its launcher skip the test, or fail it where REQUIRE_MPI is set."""
    needed = launcher.split()[0]
    is_there = (BIN / needed).exists() or shutil.which(needed) is not None
    if not is_there or (launcher != "torchrun" and not HAS_HOROVOD):
        what = needed if HAS_HOROVOD or launcher == "torchrun" else "Horovod"
        message = f"{what} is not installed; run launch/setup.sh"
        pytest.fail(message) if os.environ.get("REQUIRE_MPI") else pytest.skip(message)
    return Job(command(launcher, num_ranks, program), log)


def run(
    launcher: str, num_ranks: int, program: Sequence[str], log: Path, timeout: float = 120
) -> Outcome:
    return start(launcher, num_ranks, program, log).wait(timeout)
