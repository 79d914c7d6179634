"""Start a job, pass signals on to its ranks, start it again when it fails, leave nothing behind.

    python -m launch.supervise [--restarts N] [--min-np M] [--requeue] -- COMMAND...

What launch/train.sh, mpirun.sh and slurm.sh end in. COMMAND is a launcher's (mpirun, horovodrun,
torchrun or srun); after -np and -H in it stand the ranks and hosts of its next start.

SIGTERM, SIGINT and SIGUSR1 reach a rank, and through it all: they save and stop. A second signal
ends everything at once. Exit status: 0 after a save for SIGTERM and SIGUSR1, 130 for SIGINT, else
what COMMAND gave.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import processes
from launch.hosts import narrowed
from launch.output import Output

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ONE_REQUEST_S = 1.0  # signals within this time are one request; see engine/stopping.py
_PAUSES_S = (1, 2, 4, 8, 15, 30, 60)
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK")


def main() -> int:
    options = parse(sys.argv[1:])
    processes.become_subreaper()
    supervisor = Supervisor(options)
    for number in _STOPPING:
        signal.signal(number, supervisor.on_signal)
    try:
        return supervisor.run()
    finally:
        processes.end_descendants()


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--min-np", type=int, default=1)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    options.command = options.command[options.command[:1] == ["--"] :]
    if options.restarts < 0 or options.min_np < 1:
        parser.error(
            f"--restarts {options.restarts} --min-np {options.min_np}: allowed: 0 or more, and 1 "
            f"or more"
        )
    return options


class Supervisor:
    """One job, and its starts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._process: subprocess.Popen | None = None
        self._folder: Path | None = None  # the run's, since rank 0 has told it
        self._asked: int | None = None  # the first signal
        self._asked_at = 0.0

    # ---- signals ---------------------------------------------------------------------------------

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
            if self._process is None:
                raise SystemExit(128 + number)  # in a pause: nothing to save
            self._pass_on(number)
        elif time.monotonic() - self._asked_at > _ONE_REQUEST_S:
            say("a second signal: ending the job at once")
            processes.send(signal.SIGKILL, processes.descendants())
            raise SystemExit(128 + number)

    def _pass_on(self, number: int) -> None:
        """Send a signal to the ranks of this machine, or through mpirun to those of others."""
        below = processes.descendants()
        ranks = [pid for pid in below if _is_rank(pid)]
        mpirun = [pid for pid in below if _program(pid) in ("mpirun", "orterun", "mpiexec")]
        if ranks:
            processes.send(number, ranks)
        elif mpirun:
            processes.send(signal.SIGUSR1, mpirun)  # which passes it on to all ranks
        elif self._process is not None:
            processes.send(number, [self._process.pid])

    # ---- starts ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Start the job until it ends well, or has failed too often; return the exit status."""
        asked_for, restarts = list(self._options.command), self._options.restarts
        command, failures, first = asked_for, 0, ""
        while True:
            status, output = self._start(command)
            if self._asked is not None:
                return self._end_as_asked(status)
            if status == 0 or restarts == 0:
                return status
            if self._folder is None:
                say("the job ended before it began to train, so it is not started again")
                return status
            failures = 0 if output.has_progressed else failures + 1
            first = output.message if failures <= 1 else first
            if failures > restarts:
                say(f"the job failed {failures} times without a new checkpoint: giving up. First:\n"
                    f"{first}\nLast:\n{output.message}")  # fmt: skip
                return status
            command = self._after_pause(asked_for, failures)
            if command is None:
                return status

    def _start(self, command: Sequence[str]) -> tuple[int, Output]:
        """Start the job once; return its exit status, and what it printed."""
        output = Output(is_read=self._options.restarts > 0)
        self._process = process = processes.start(
            command, {**os.environ, "PARSIMONY_SUPERVISED": "1"}, **output.pipes()
        )
        output.follow(process)
        if self._asked is not None:  # it came before there was a process to tell
            self._pass_on(self._asked)
        status = processes.wait(process)
        processes.end_descendants()
        output.finish()
        self._process, self._folder = None, output.folder or self._folder
        return (status if status >= 0 else 128 - status), output

    def _end_as_asked(self, status: int) -> int:
        if self._asked == signal.SIGUSR1 and self._options.requeue:
            job = os.environ.get("SLURM_JOB_ID", "")
            done = subprocess.run(["scontrol", "requeue", job], check=False)
            say(f"asked SLURM to queue job {job} again" if done.returncode == 0 else
                f"SLURM would not queue job {job} again: submit it anew")  # fmt: skip
        if status == 0 and self._asked == signal.SIGINT:
            return 128 + signal.SIGINT
        return status

    def _after_pause(self, asked_for: list[str], failures: int) -> list[str] | None:
        """Wait; return the command for the hosts that answer then; None if too few do for long."""
        for number in range(max(1, failures), self._options.restarts + 1):
            pause = _PAUSES_S[min(number, len(_PAUSES_S)) - 1]
            say(f"starting again in {pause} s")
            time.sleep(pause)
            command, problem = narrowed(asked_for, self._options.min_np)
            if problem is None:
                if command != asked_for:
                    say("+ " + shlex.join(command))
                return command
            say(problem)
        say("giving up")
        return None


def _is_rank(pid: int) -> bool:
    words = processes.words_of(pid)
    if not any(os.path.basename(word) == "train.py" for word in words[1:4]):
        return False
    return any(name in processes.environment_of(pid) for name in _RANK_VARIABLES)


def _program(pid: int) -> str:
    return os.path.basename(processes.words_of(pid)[0])


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
