"""Imported by the fork server of loader processes as it starts: see engine.sampling.

It ends with its rank, and its processes with it: torch's own watch does not help, as it looks at a
process's parent, which is the fork server. Ctrl-C in a terminal, which reaches them too, is for the
rank to answer: it may still want their batches.
"""

import os
import signal

from engine.orphans import end_with_parent

_SERVER = os.getpid()


def _become_loader() -> None:
    end_with_parent(_SERVER)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


end_with_parent(os.getppid())
for _number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(_number, signal.SIG_IGN)
os.register_at_fork(after_in_child=_become_loader)
