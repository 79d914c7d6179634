"""Who is missing when ranks wait for one another: asked beside Horovod, which does not tell.

Rank 0 keeps a store of torch.distributed, whose own thread answers whatever Python does. A rank
that has waited for most of the limit signs in there, with what it waits for; at the limit, those
who have not signed in are missing. Where the store does not answer, that is rank 0.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dgc.comm.horovod import addresses

_ANSWER_WITHIN = timedelta(seconds=5)
_STAYS_S = 2.0


class RollCall:
    """One rank's way to the list. Made by all ranks of a job, by `begin`.

    hosts: of all ranks. of_rank_0: its addresses. port: of its store.
    """

    def __init__(
        self, rank: int, hosts: list[str], of_rank_0: list[str], port: int, store: Any
    ) -> None:
        self._rank, self._hosts, self._port = rank, hosts, port
        self._addresses, self._store = of_rank_0, store
        self._is_silent = False  # whether rank 0 has once not answered: nobody asks it again

    def sign(self, name: str) -> None:
        """Write down that this rank waits for a collective."""
        self._with_store(lambda store: store.set(f"waits/{self._rank}", name))

    def take_back(self) -> None:
        self._with_store(lambda store: store.delete_key(f"waits/{self._rank}"))

    def missing(self) -> str:
        """Return a sentence that names the ranks that do not wait, as far as that is known."""
        ranks = range(len(self._hosts))
        try:
            absent = self._with_store(
                lambda store: [rank for rank in ranks if not store.check([f"waits/{rank}"])]
            )
        except RuntimeError:
            absent = [0]
        if self._rank == 0:
            time.sleep(_STAYS_S)  # with this process the store ends, which others want to ask
        if not absent:
            return " All ranks wait, for different collectives."
        named = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in absent[:8])
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        return f" Missing: {named}{more}: stopped, cut off, or busy with something else."

    def _with_store(self, do: Callable[[Any], Any]) -> Any:
        """Raises: RuntimeError where rank 0's store does not answer.

        On a thread: where rank 0 is stopped, torch's own calls do not keep their limits.
        """
        if self._is_silent:
            raise RuntimeError("rank 0 does not answer")
        answers: list[Any] = []

        def ask() -> None:
            try:
                if self._store is None:
                    self._store = self._reach()
                answers.append(do(self._store))
            except (RuntimeError, OSError) as error:
                answers.append(RuntimeError(f"rank 0 does not answer: {error}"))

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_ANSWER_WITHIN.total_seconds() + 1)
        self._is_silent = not answers
        if self._is_silent:
            raise RuntimeError("rank 0 does not answer")
        if isinstance(answers[0], RuntimeError):
            raise answers[0]
        return answers[0]

    def _reach(self) -> Any:
        for address in addresses.to_try(self._hosts[0], self._addresses):
            try:
                return dist.TCPStore(address, self._port, is_master=False, timeout=_ANSWER_WITHIN)
            except (RuntimeError, OSError):
                continue
        raise RuntimeError("rank 0 cannot be reached")


def begin(rank: int, all_gather_object: Callable[[Any], list[Any]]) -> RollCall:
    """Make the roll call of a job's ranks. A collective."""
    store = None
    mine: tuple[Any, ...] = (socket.gethostname(),)
    if rank == 0:
        store = dist.TCPStore(
            addresses.LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=_ANSWER_WITHIN
        )
        mine += (addresses.own(), store.port)
    everyone = all_gather_object(mine)
    hosts, (_, of_rank_0, port) = [host for host, *_ in everyone], everyone[0]
    return RollCall(rank, hosts, of_rank_0, port, store)
