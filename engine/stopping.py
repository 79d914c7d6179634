"""Signals that ask a run to stop: it ends its step, saves, and can be taken up again.

A signal to any rank is noted there, told to all with the next step's notices, and heeded by all
after that step.

| it comes                                  | what happens, on all ranks        | exit status   |
| ----------------------------------------- | --------------------------------- | ------------- |
| while Python imports, with --evaluate     | the job ends; nothing is lost     | 128 + number  |
| connecting, reading data, resuming        | they stop before the first step   | 0, SIGINT 130 |
| in a step, while a checkpoint is saved    | they end this step or the next,   | 0, SIGINT 130 |
|                                           | save unless it is saved, and stop |               |
| in evaluation at an epoch's end           | they end the epoch, save and stop | 0, SIGINT 130 |
| in the last evaluation, or later          | the run is completed              | 0             |
| a second one, a second or more later      | the job ends at once              | 128 + number  |
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SAVE_AND_END = (signal.SIGTERM, signal.SIGUSR1)
"""A job that ends by these has ended well: its exit status is 0."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit status of a job that SIGINT, which is Ctrl-C, has stopped."""
# The file in which launch/supervise.py wants that status: launchers complain of ranks that end with
# one other than 0, and some change it.
_SUPERVISED = "PARSIMONY_SUPERVISED"

# A terminal sends Ctrl-C to launchers and ranks at once, and launchers pass it on: all of this is
# one request.
_ONE_REQUEST_S = 1.0


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 to this process; a second one ends it at once."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._first_at = 0.0

    def listen(self) -> None:
        """Note signals from now on. In the main thread only."""
        for number in (*SAVE_AND_END, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self._first_at = number, time.monotonic()
        elif time.monotonic() - self._first_at > _ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def notices(self) -> dict[str, int]:
        """Return what this rank tells the others: that it was asked to stop, or interrupted."""
        if self._first is None:
            return {}
        return {"interrupt" if self._first == signal.SIGINT else "stop": 1}


def exit_status(notices: dict[str, int]) -> int | None:
    """Return the status with which all ranks end, by the sums of their notices; None: go on."""
    if notices["interrupt"]:
        return 0 if _tell_supervisor(INTERRUPTED) else INTERRUPTED
    return 0 if notices["stop"] else None


def _tell_supervisor(status: int) -> bool:
    """Tell the exit status to the supervisor of this job; False if there is none on this host."""
    try:
        file = os.open(os.environ[_SUPERVISED], os.O_WRONLY | os.O_TRUNC)
    except (KeyError, OSError):
        return False
    with os.fdopen(file, "w") as supervisor:
        supervisor.write(str(status))
    return True
