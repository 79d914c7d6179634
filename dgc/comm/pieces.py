"""Collectives of any size, in pieces that one call of Horovod's can carry.

Horovod, MPI and Gloo count a call's bytes, and where a rank's part begins in a gather, in an int.
Each generator here is one collective: it yields the handle of a call, is sent what that returned,
and returns the whole. All ranks make the same calls in the same order: how many there are follows
from what all know. A collective that one call can carry is that one call.
Shapes: P ranks.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

# At most, in one call, with all that it gathers: half of what an int can count.
MOST_BYTES = 2**30
# In each of several calls. Larger pieces are no faster, take memory where they must be copied, and
# may last longer than 30 s, after which Gloo gives a call up.
PIECE_BYTES = 2**26
STALL_LIMIT = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"  # Horovod's, and without Horovod ours too
_HELP_EVERY = 0.01  # seconds in which one who waits helps other collectives on

Calls = Generator[Any, Any, Any]
SIGN_AT = 0.8  # of the limit: by so much ranks may begin to wait at different times


class RollCall(Protocol):
    """Where waiting ranks sign in, so that it can be told who is missing."""

    def sign(self, name: str) -> None:
        """Write down that this rank waits for a collective. Raises: RuntimeError if it cannot."""

    def take_back(self) -> None: ...
    def missing(self) -> str:
        """Return a sentence that names who has not signed."""


class Stepwise:
    """The handle of a collective of several calls, each of which starts when the last one is done.

    It goes on when it is polled or awaited, and when this rank waits for another collective: the
    others may wait for this one first.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls, self._is_done, self._result = calls, False, None
        self._failure: Exception | None = None
        self._handle = next(calls)
        _under_way[id(self)] = self

    def poll(self) -> bool:
        with _going_on:
            while not self._is_done and self._handle.poll():
                self._go_on()
        return self._is_done

    def _go_on(self) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            self._handle = self._calls.send(self._handle.wait())
        except StopIteration as end:
            self._result, self._is_done = end.value, True
            _under_way.pop(id(self), None)
        except Exception as error:
            self._failure = error
            _under_way.pop(id(self), None)
            raise

    def wait(self) -> Any:
        while not self._is_done:
            handle = self._handle
            wait_until(
                lambda h=handle: self.poll() or self._handle is not h,
                handle.name,
                getattr(handle, "roll_call", None),
            )
        return self._result


_under_way: weakref.WeakValueDictionary[int, Stepwise] = weakref.WeakValueDictionary()
_going_on = threading.RLock()  # autograd has a thread for each device


def _help_others() -> None:
    for other in list(_under_way.values()):
        with contextlib.suppress(Exception):  # the error is raised to whoever waits for it
            other.poll()


def stall_seconds() -> float:
    """Return how long a rank waits for another at most; 0: for ever."""
    return max(0.0, float(os.environ.get(STALL_LIMIT, "600")))


def stall_error(limit: float, name: str, who: str = "") -> TimeoutError:
    """Return what a rank says that has waited for so long. who: is missing, if that is known."""
    return TimeoutError(
        f"waited {limit:g} s for the other ranks to join collective {name!r}; they are stuck or do "
        f"something else.{who} {STALL_LIMIT} sets the limit, 0 for none"
    )


def wait_until(poll: Callable[[], bool], name: str, roll_call: RollCall | None = None) -> None:
    """Wait no longer than Horovod's own limit, which under Gloo Horovod does not keep.

    roll_call: knows who is missing then.
    """
    limit = stall_seconds()
    start, pause, helps_at = time.monotonic(), 0.0001, _HELP_EVERY
    signs_at = math.inf if roll_call is None or not limit else SIGN_AT * limit
    while not poll():
        waited = time.monotonic() - start
        if waited > limit > 0:
            raise stall_error(limit, name, "" if roll_call is None else roll_call.missing())
        if waited > signs_at:
            with contextlib.suppress(RuntimeError):  # `missing` will tell
                roll_call.sign(name)
            signs_at = math.inf
        if waited > helps_at:
            _help_others()
            helps_at = waited + _HELP_EVERY
        time.sleep(pause)
        # Leave the core to other ranks, if there are more of them than cores.
        pause = min(1.1 * pause, 0.001)
    if signs_at == math.inf and roll_call is not None and limit:
        with contextlib.suppress(RuntimeError):
            roll_call.take_back()


def check_sendable(tensor: Tensor, name: str) -> None:
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{name} is bfloat16, which no Horovod collective takes; send float32")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty; send at least one element (some back ends hang)")


# ---- what one rank's part may be -----------------------------------------------------------------


def fits(num_bytes: int) -> bool:
    """Tell whether one call may carry so many bytes, over all that it gathers."""
    return num_bytes <= MOST_BYTES


def piece_elements(tensor: Tensor, num_ranks: int = 1) -> int:
    """Return how many elements each of so many ranks gives to one of several calls."""
    return max(1, PIECE_BYTES // (num_ranks * tensor.element_size()))


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield views that make up a tensor, of PIECE_BYTES at most, by its shape and type alone.

    Strides, which may differ between ranks, do not matter.
    """
    if tensor.dim() == 0 or tensor.nbytes <= PIECE_BYTES:
        yield tensor
    elif len(tensor) == 1:
        yield from parts_of(tensor[0])
    else:
        rows = max(1, PIECE_BYTES * len(tensor) // tensor.nbytes)
        for part in tensor.split(rows):
            yield from parts_of(part)


def as_bytes(tensor: Tensor) -> tuple[Tensor, bool]:
    """Return (bytes,) uint8, and whether they are the tensor's own memory and not a copy."""
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    flat = plain.as_strided((plain.numel(),), (1,))  # of one element, any stride is contiguous
    return flat.view(torch.uint8), plain.data_ptr() == tensor.data_ptr()


def take_in(tensor: Tensor, wire: Tensor, is_own: bool) -> None:
    """Let a tensor have the bytes that came into those of `as_bytes`: its own, or a copy."""
    if is_own:
        increment_version(tensor)
    else:
        tensor.copy_(wire.view(tensor.dtype).view(tensor.shape))


# ---- the collectives -----------------------------------------------------------------------------


def all_reduce(call: Callable[[Tensor, str], Any], tensor: Tensor, name: str) -> Calls:
    """Sum in place. call: starts to sum a part in place."""
    for number, part in enumerate(tensor.view(-1).split(piece_elements(tensor))):
        yield call(part, f"{name}.{number}")
    return tensor


def reduce_scatter(call: Callable[[Tensor, str], Any], rows: Tensor, name: str) -> Calls:
    """Sum (P, m) and return this rank's row (m,). call: the same for some columns."""
    sums = []
    for number, part in enumerate(rows.split(piece_elements(rows, len(rows)), dim=1)):
        sums.append((yield call(part.contiguous(), f"{name}.{number}")))
    return torch.cat(sums)


def all_gather(
    call: Callable[[Tensor, str], Any], tensor: Tensor, name: str, num_ranks: int
) -> Calls:
    """Join (n_r,) of all ranks. call: starts to join parts.

    The first call carries as much of each rank's as it may. Where all of them together are less
    than one rank may give, no rank has more, and every rank sees that. Else sizes are exchanged,
    and what is left follows; a rank that has nothing left gives one element, which is not used.
    """
    most = max(1, MOST_BYTES // (num_ranks * tensor.element_size()))
    joined = yield call(tensor if len(tensor) <= most else tensor[:most], name)
    if joined.numel() < most:
        return joined
    sizes = (yield call(_count([tensor]), f"{name}.sizes")).tolist()
    if max(sizes) <= most:
        return joined
    whole = tensor.new_empty(sum(sizes))
    slots = whole.split(sizes)
    for number in range(math.ceil(max(sizes) / most)):
        if number:
            joined = yield call(_piece(tensor, number, most), f"{name}.{number}")
        _put(joined, slots, number, most)
    return whole


def all_to_all(
    call: Callable[[list[Tensor], str], Any],
    gather: Callable[[Tensor, str], Any],
    parts: list[Tensor],
    name: str,
    rank: int,
) -> Calls:
    """Send each rank its part, after an exchange of sizes. call, gather: one call of either."""
    num_ranks = len(parts)
    sizes = (yield gather(_count(parts), f"{name}.sizes")).view(num_ranks, num_ranks)
    most = piece_elements(parts[0], num_ranks)
    received = [parts[0].new_empty(size) for size in sizes[:, rank].tolist()]
    for number in range(math.ceil(int(sizes.max()) / most)):
        pieces = [_piece(part, number, most) for part in parts]
        joined = torch.cat((yield call(pieces, f"{name}.{number}")))
        _put(joined, received, number, most)
    return received


def _count(parts: list[Tensor]) -> Tensor:
    return torch.tensor([part.numel() for part in parts], dtype=torch.int64, device="cpu")


def _piece(tensor: Tensor, number: int, most: int) -> Tensor:
    """Return the elements of a round, or one of any where none is left."""
    piece = tensor[number * most : (number + 1) * most]
    return piece if piece.numel() else tensor[:1]


def _put(joined: Tensor, slots: list[Tensor], number: int, most: int) -> None:
    """Copy each rank's `_piece`, joined end to end, to where it belongs."""
    begin = 0
    for place in slots:
        target = place[number * most : (number + 1) * most]
        target.copy_(joined[begin : begin + target.numel()])
        begin += max(1, target.numel())
