"""Messages between ranks that are met by name, over point-to-point calls of torch.distributed.

torch.distributed matches calls by their order, which may differ between ranks that start what they
can as soon as they can. Here each message carries the name of what it is for, and for each other
rank a thread takes in whatever that rank sends. So no order has to be agreed on, nobody waits in
order to send, and what is sent arrives whether or not it is expected yet: it waits in memory.
Whoever wants nothing large to wait there, asks for it first.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from dgc.comm.pieces import as_bytes, stall_error, stall_seconds

FRAME_BYTES = 2**14  # of a message that goes as one call; of a larger one, the first call
_TAG = 20_260  # of all our calls, which nobody else's may meet
_FOREVER = timedelta(days=10_000)
_MOST_TOLD = 1000  # messages to listeners that are kept until they have surely been sent

Then = Callable[["Post"], None]
Listener = Callable[[str, int, Tensor], None]  # the rest of the name, sender, value


class Post:
    """The messages of one name, by sender; complete when those who were expected are there."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self.into: Mapping[int, Tensor] = {}
        self.senders: frozenset[int] | None = None  # None: not asked for yet
        self.after: Post | None = None
        self.then: Then | None = None
        self.failure: Exception | None = None

    def missing(self) -> list[int]:
        """Return who has not sent what this waits for, first of what must come first."""
        earlier = [] if self.after is None else self.after.missing()
        return earlier or sorted((self.senders or frozenset()) - self.values.keys())

    def why_failed(self) -> Exception | None:
        return self.failure or (self.after and self.after.why_failed())

    @property
    def is_complete(self) -> bool:
        return self.senders is not None and self.senders <= self.values.keys()


class Mail:
    """One rank's letter box and pen.

    backend: torch's gloo group of all ranks, for us alone; rank: among them.
    """

    def __init__(self, backend: Any, rank: int, world_size: int) -> None:
        self._backend, self.rank, self._pid = backend, rank, os.getpid()
        self._changed = threading.Condition()
        self._posts: dict[str, Post] = {}
        self._gone: dict[int, str] = {}
        self._unfinished: dict[str, list[Any]] = {}  # what was sent must live until it is
        self._told: deque[Any] = deque()
        self.listeners: dict[str, Listener] = {}  # by how a name begins
        others = [other for other in range(world_size) if other != rank]
        self._pens = {other: threading.Lock() for other in others}
        self._farewells = {other: threading.Event() for other in others}
        self._threads = [
            threading.Thread(target=self._take_in, args=(o,), name=f"mail from {o}", daemon=True)
            for o in others
        ]
        for thread in self._threads:
            thread.start()

    # ---- out -------------------------------------------------------------------------------------

    def send(self, to: int, name: str, value: Tensor) -> None:
        """Start to send; value: on the CPU, of any type. It may change after `finish_sending`."""
        works = self._start(to, name, value)
        with self._changed:
            self._unfinished.setdefault(name, []).extend((to, work) for work in works)

    def tell(self, to: int, name: str, value: Tensor) -> None:
        """Give a rank's listener, which may be our own, something that will not change."""
        if to == self.rank:
            self._deliver(name, to, value)
            return
        self._told.extend(self._start(to, name, value))
        while len(self._told) > _MOST_TOLD:
            self._told.popleft().wait(_FOREVER)

    def _start(self, to: int, name: str, value: Tensor) -> list[Any]:
        payload, _ = as_bytes(value.detach().reshape(-1))
        head = pickle.dumps((name, value.dtype, payload.numel()))
        room = FRAME_BYTES - 4 - len(head)
        if room < 0:
            raise ValueError(f"the name of a collective has {len(head)} bytes; allowed: {room}")
        is_small = payload.numel() <= room
        start = len(head).to_bytes(4, "little") + head
        frame = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        parts = [torch.cat([frame, payload])] if is_small else [frame, payload]
        try:
            with self._pens[to]:
                return [self._backend.send([part], to, _TAG) for part in parts]
        except RuntimeError as error:
            raise self._lost(to, name, error) from error

    def finish_sending(self, name: str) -> None:
        """Wait until what was sent under a name has left this rank's memory."""
        limit = stall_seconds()
        with self._changed:
            sent = self._unfinished.pop(name, ())
        for to, work in sent:
            try:
                work.wait(timedelta(seconds=limit) if limit else _FOREVER)
            except RuntimeError as error:
                raise self._lost(to, name, error) from error

    def _lost(self, other: int, name: str, error: Exception) -> RuntimeError:
        why = self._gone.get(other) or f"rank {other} takes nothing in ({error})"
        return RuntimeError(f"collective {name!r} cannot go on: {why}")

    # ---- in --------------------------------------------------------------------------------------

    def expect(
        self,
        name: str,
        senders: Iterable[int],
        mine: Tensor | None = None,
        into: Mapping[int, Tensor] | None = None,
        after: Post | None = None,
        then: Then | None = None,
    ) -> Post:
        """Ask for the messages of a name. mine: this rank's own.

        into: where a sender's bytes shall lie, contiguous. after: what must be complete before
        others send. then: called with the complete post, which is then forgotten, by whichever
        thread completes it; what it raises fails the post.
        """
        with self._changed:
            post = self._posts.setdefault(name, Post())
            post.into = into or {}
            for sender, slot in post.into.items():
                if sender in post.values:  # it came early
                    post.values[sender] = _put(post.values[sender], slot)
            if mine is not None:
                post.values[self.rank] = mine
            post.after, post.then, post.senders = after, then, frozenset(senders)
            is_complete = post.is_complete
        if is_complete:
            self._complete(name, post)
        return post

    def add(self, name: str, mine: Tensor) -> None:
        """Put this rank's own message in, later than with `expect`."""
        self._deliver(name, self.rank, mine)

    def wait(self, post: Post, name: str, what: str) -> dict[int, Tensor]:
        """Return the messages and forget the post. what: the collective, as its user knows it.

        Raises: TimeoutError where a rank is stuck, RuntimeError where one has left.
        """
        limit = stall_seconds()
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(post), limit or None)
            missing = post.missing()
            self._posts.pop(name, None)
        if (failure := post.why_failed()) is not None:
            raise failure
        self.refuse_gone(missing, what)
        if missing:
            raise stall_error(limit, what, f" Missing: ranks {missing}.")
        return post.values

    def refuse_gone(self, ranks: Iterable[int], what: str) -> None:
        """Raise RuntimeError if any of the ranks, which a collective needs, has left."""
        gone = [self._gone[rank] for rank in ranks if rank in self._gone]
        if gone:
            raise RuntimeError(f"{'; '.join(gone)}, and this rank waits for collective {what!r}")

    def poll(self, post: Post) -> bool:
        """Tell whether `wait` would return, or raise, at once."""
        return self._is_over(post)

    def _is_over(self, post: Post) -> bool:
        if post.is_complete or post.why_failed() is not None:
            return True
        return bool(self._gone) and not self._gone.keys().isdisjoint(post.missing())

    def _take_in(self, sender: int) -> None:
        """Take in all that a rank sends, until either of the two leaves."""
        frame = torch.empty(FRAME_BYTES, dtype=torch.uint8, device="cpu")
        try:
            while True:
                self._receive(frame, sender)
                size = int.from_bytes(frame[:4].numpy().tobytes(), "little")
                name, dtype, num_bytes = pickle.loads(frame[4 : 4 + size].numpy().tobytes())
                if name is None:
                    break
                payload = self._place(name, sender, num_bytes)
                if 4 + size + num_bytes <= FRAME_BYTES:
                    payload.copy_(frame[4 + size : 4 + size + num_bytes])
                else:
                    self._receive(payload, sender)
                self._deliver(name, sender, payload.view(dtype))
        except Exception as error:
            reason = str(error).partition("] ")[2].partition(". ")[0]  # gloo says more
            self._note_gone(sender, f"rank {sender} was lost ({reason or error})")
            return
        with contextlib.suppress(Exception):
            self._bid_farewell(sender)  # it waits for ours before it goes
        self._note_gone(sender, f"rank {sender} has left (it ended, or closed its TorchComm)")

    def _receive(self, target: Tensor, sender: int) -> None:
        self._backend.recv([target], sender, _TAG).wait(_FOREVER)

    def _place(self, name: str, sender: int, num_bytes: int) -> Tensor:
        """Return where a message shall lie (num_bytes,): where it is wanted, or in new memory."""
        with self._changed:
            post = self._posts.get(name)
            slot = post.into.get(sender) if post is not None else None
        if slot is not None and slot.nbytes == num_bytes:
            return slot.view(-1).view(torch.uint8)
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def _deliver(self, name: str, sender: int, value: Tensor) -> None:
        for start, listener in self.listeners.items():
            if name.startswith(start):
                listener(name.removeprefix(start), sender, value)
                return
        with self._changed:
            post = self._posts.setdefault(name, Post())
            slot = post.into.get(sender)
            post.values[sender] = value if slot is None else _put(value, slot)
            is_complete = post.is_complete
        if is_complete:
            self._complete(name, post)

    def _complete(self, name: str, post: Post) -> None:
        if post.then is not None:
            try:
                post.then(post)
            except Exception as error:
                post.failure = error
            with self._changed:
                del self._posts[name]
        with self._changed:
            self._changed.notify_all()

    # ---- the end ---------------------------------------------------------------------------------

    def leave(self, seconds: float = 10.0) -> None:
        """Tell the others, so that their threads and ours end; wait for them, but not for ever."""
        if os.getpid() != self._pid:  # a process that this one forked has no say
            return
        for other in self._pens:
            with contextlib.suppress(Exception):  # it may be gone
                self._bid_farewell(other)
        for thread in self._threads:
            thread.join(seconds)

    def _bid_farewell(self, other: int) -> None:
        """Send a rank our last message, once."""
        with self._pens[other]:
            if self._farewells[other].is_set():
                return
            self._farewells[other].set()
            head = pickle.dumps((None, None, 0))
            start = bytearray(len(head).to_bytes(4, "little") + head)
            frame = torch.frombuffer(start, dtype=torch.uint8)
            self._backend.send([frame], other, _TAG).wait(timedelta(seconds=10))

    def _note_gone(self, other: int, why: str) -> None:
        with self._changed:
            self._gone[other] = why
            self._changed.notify_all()


def _put(value: Tensor, slot: Tensor) -> Tensor:
    """Return what came, where it is wanted; what has another size stays where it is."""
    if value.data_ptr() == slot.data_ptr() or value.nbytes != slot.nbytes:
        return value
    return slot.copy_(value.view(slot.dtype).view(slot.shape))
