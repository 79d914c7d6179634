"""How a job ends on all of its ranks: together, or because one of them failed."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import TypeVar

from dgc.comm.interface import Comm

AnyComm = TypeVar("AnyComm", bound=Comm)


@contextlib.contextmanager
def ended_together(comm: AnyComm) -> Iterator[AnyComm]:
    """Close the comm at the end; if this rank fails, print why and end the job on every rank."""
    leaving: SystemExit | None = None
    try:
        try:
            yield comm
        except SystemExit as error:
            if error.code not in (0, None):
                raise
            leaving = error
        comm.close()
    except BaseException as error:
        _report_failure(error, comm.rank)
        comm.abort()
    if leaving is not None:
        raise leaving


def _report_failure(error: BaseException, rank: int) -> None:
    """Print the message of a mistake, or the whole trace of anything else, with the rank."""
    if isinstance(error, SystemExit):
        text = f"{error.code}\n"
    else:
        text = "".join(traceback.format_exception(error))
    print(f"rank {rank} failed and ends the job:\n{text}", file=sys.stderr, end="", flush=True)
