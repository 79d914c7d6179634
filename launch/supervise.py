"""Start a job, pass signals on to its ranks, start it again when it fails, leave nothing behind.

    python -m launch.supervise [--restarts N] [--min-np M] [--requeue] -- COMMAND...

What launch/train.sh, mpirun.sh and slurm.sh end in. COMMAND is a launcher's (mpirun, horovodrun,
torchrun or srun); after -np and -H in it stand the ranks and hosts of its next start.

SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a terminal that is closed) reach a rank, and through it all:
they save and stop. A second signal ends everything at once. Exit status: 130 after a save for
SIGINT, 0 for the others, 128 + number where there was nothing to save, else what COMMAND gave.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launch import leftovers, processes
from launch.hosts import narrowed, silent_hosts
from launch.output import Output

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ONE_REQUEST_S = 1.0  # signals within this time are one request; see engine/stopping.py
_PAUSES_S = (0, 1, 2, 4, 8, 15, 30, 60)  # after so many failures without progress
_LOOK_AGAIN_S = 0.2
_SAYS_AFTER_S = 15.0  # that there is nobody to pass a signal on to; ranks start within that time
_LAUNCHER_ENDS_WITHIN_S = 30.0  # of the last rank of this machine
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK", "PMIX_RANK")


def main() -> int:
    options = parse(sys.argv[1:])
    processes.become_subreaper()
    try:
        return Supervisor(options).run()
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


class _Asked(Exception):
    """A signal came while no rank was there that could save."""


class Failures:
    """How often a job has failed since its last new checkpoint."""

    def __init__(self, num_allowed: int) -> None:
        self._num_allowed = num_allowed
        self.number, self.first = 0, ""
        self._last: Output | None = None
        self._has_trained = False

    def add(self, output: Output) -> str | None:
        """Count a failure; return why the job is not worth another start, if so."""
        self.number = 0 if output.has_progressed else self.number + 1
        if self.number <= 1:
            self.first = output.message
        last, self._last = self._last, output
        self._has_trained |= not output.has_failed_early
        # Before the first step it is a person's mistake; after it, the machine's, which may pass.
        if not self._has_trained and last is not None and output.is_like(last):
            return "twice the job failed alike before its first step"
        if self.number > self._num_allowed:
            return f"the job failed {self.number} times without a new checkpoint"
        return None


class Supervisor:
    """One job, and its starts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._process: subprocess.Popen | None = None
        self._asked: int | None = None  # the first signal
        self._asked_at = 0.0
        self._has_told_launcher = False
        self._unasked: set[str] = set()  # hosts of which it means nothing that they do not answer
        # Ranks of this machine write there with which status a signal has stopped them; as exit
        # statuses of theirs launchers would complain of them, and change them.
        self._told = tempfile.TemporaryFile("w+")  # it has no name that a kill would leave behind

    @property
    def _told_path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._told.fileno()}"

    # ---- signals ---------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked, self._asked_at = number, time.monotonic()
            if self._process is None:
                raise _Asked
            self._tell()
        elif time.monotonic() - self._asked_at > _ONE_REQUEST_S:
            say("a second signal: ending the job at once")
            processes.send(signal.SIGKILL, processes.descendants())
            raise SystemExit(128 + number)

    def _tell(self, *_: object) -> None:
        """Ask this machine's ranks to save and stop, or those of others through their launcher.

        As SIGUSR1 whichever signal it was: mpirun and srun pass that one on and do no more. One
        rank would be enough. While none is seen here, which may be because they are only starting,
        this looks again.
        """
        below = {pid: processes.words_of(pid) for pid in processes.descendants()}
        ranks = [pid for pid, words in below.items() if _is_rank(pid, words)]
        launchers = [pid for pid, words in below.items() if _passes_on(words)]
        if ranks and not any(processes.listens(pid, signal.SIGUSR1) for pid in ranks):
            processes.send(signal.SIGKILL, list(below))  # they are starting: nothing to save
            raise _Asked
        processes.send(signal.SIGUSR1, ranks)
        if not ranks:
            if launchers and not self._has_told_launcher:
                processes.send(signal.SIGUSR1, launchers[:1])
                self._has_told_launcher = True
            if not launchers and time.monotonic() - self._asked_at > _SAYS_AFTER_S:
                say(
                    "no rank on this machine to ask, and the launcher does not pass signals on; a "
                    "signal to any rank stops the job with a checkpoint, a second one here at once"
                )
                return
            signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S)

    # ---- starts ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Start the job until it ends well, or has failed too often; return the exit status."""
        try:
            for number in _STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    signal.signal(number, self._on_signal)
            signal.signal(signal.SIGALRM, self._tell)
            return self._run()
        except _Asked:
            assert self._asked is not None
            return self._end_as_asked(128 + self._asked)

    def _run(self) -> int:
        asked_for, failures = list(self._options.command), Failures(self._options.restarts)
        command = asked_for
        if self._options.restarts:
            threading.Thread(target=self._doubt_probes, args=(asked_for,), daemon=True).start()
        while True:
            status, output = self._start(command)
            if self._asked is not None:
                return self._end_as_asked(status)
            if status == 0 or self._options.restarts == 0 or output.was_stopped:
                return status or self._told_status()
            if problem := failures.add(output):
                say(f"{problem}: giving up. First:\n{failures.first}\nLast:\n{output.message}")
                return status
            if output.has_failed_early:
                self._unasked.clear()  # they may have been gone from the start
            command = self._after_pause(asked_for, failures.number)

    def _doubt_probes(self, command: Sequence[str]) -> None:
        """Find the hosts that do not answer us while the job runs there: launchers may have another
        way to them than we (a port, a key, a name of this machine)."""
        self._unasked |= set(silent_hosts(command))

    def _start(self, command: Sequence[str]) -> tuple[int, Output]:
        """Start the job once; return its exit status, and what it printed."""
        output = Output(is_read=self._options.restarts > 0)
        self._told.truncate(0)
        environment = {**os.environ, "PARSIMONY_SUPERVISED": self._told_path}
        try:
            self._process = process = processes.start(command, environment, **output.pipes())
        except OSError as error:
            say(f"{shlex.join(command)} cannot be started ({error}); see launch/doctor")
            raise SystemExit(127) from error
        output.follow(process)
        threading.Thread(target=_end_when_abandoned, args=(process,), daemon=True).start()
        status = processes.wait(process)
        processes.end_descendants()
        leftovers.sweep()
        output.finish()
        self._process = None
        return (status if status >= 0 else 128 - status), output

    def _told_status(self) -> int:
        """Return the exit status that ranks have told; 0 if they have not."""
        return int(Path(self._told_path).read_text() or 0)

    def _end_as_asked(self, status: int) -> int:
        assert self._asked is not None
        if self._asked == signal.SIGUSR1 and self._options.requeue:
            _requeue(os.environ.get("SLURM_JOB_ID", ""))
        return 128 + signal.SIGINT if (status, self._asked) == (0, signal.SIGINT) else status

    def _after_pause(self, asked_for: list[str], failures: int) -> list[str]:
        """Wait until enough hosts answer; return the command for those that do."""
        told, number = None, failures
        while True:
            pause = _PAUSES_S[min(number, len(_PAUSES_S) - 1)]
            if problem_is_new := told is None:
                say(f"starting again in {pause} s" if pause else "starting again")
            time.sleep(pause)
            command, problem = narrowed(asked_for, self._options.min_np, self._unasked)
            if problem is None:
                if command != asked_for:
                    say("+ " + shlex.join(command))
                return command
            if problem_is_new or problem != told:
                say(f"waiting: {problem}")
            told, number = problem, number + 1


def _end_when_abandoned(launcher: subprocess.Popen) -> None:
    """End a launcher that stays when all ranks of this machine have ended.

    Open MPI 4 ends every rank when one aborts, and then waits for the daemons of all hosts: without
    end, where a host is cut off (seen: minutes, until TCP gives up).
    """
    has_begun, alone_since = False, None
    while launcher.returncode is None:
        time.sleep(_LAUNCHER_ENDS_WITHIN_S / 10)
        if any(_is_rank(pid, processes.words_of(pid)) for pid in processes.descendants()):
            has_begun, alone_since = True, None
        elif has_begun:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > _LAUNCHER_ENDS_WITHIN_S:
                say(
                    f"no rank is left here since {_LAUNCHER_ENDS_WITHIN_S:.0f} s, but the launcher "
                    f"still waits for another host, which may be cut off: ending it"
                )
                processes.send(signal.SIGTERM, [launcher.pid])
                time.sleep(2 * processes.GRACE_S)
                if launcher.returncode is None:
                    processes.send(signal.SIGKILL, [launcher.pid])
                return


def _requeue(job: str) -> None:
    """Ask SLURM to queue this job again."""
    say(f"asking SLURM to queue job {job} again")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"it is not queued ({error}): submit it anew")


def _is_rank(pid: int, words: Sequence[str]) -> bool:
    if not any(os.path.basename(word) == "train.py" for word in words[1:4]):
        return False
    return any(name in processes.environment_of(pid) for name in _RANK_VARIABLES)


def _passes_on(words: Sequence[str]) -> bool:
    return os.path.basename(words[0]) in ("mpirun", "orterun", "mpiexec", "srun")


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
