"""A store of torch.distributed in which nothing lies of ranks that are dead, or of earlier groups.

torchrun keeps one store while it starts a job's ranks again (`--max-restarts`), and torch looks in
it for the addresses of the other ranks: it may find those of the ranks before them. And which start
this one is, machines may count differently. So rank 0 numbers it, and tells those who are alive.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_LOOK_EVERY = 0.02  # seconds
_num_made = 0


def fresh_store(store: Any, rank: int, world_size: int, seconds: float) -> Any:
    """Return a part of the store that is of this start, and this call, alone. Collective.

    Raises: TimeoutError where ranks do not come in so many seconds.
    """
    global _num_made
    _num_made += 1
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return dist.PrefixStore(f"parsimony/{_num_made}", store)  # there is one start
    limit = timedelta(seconds=seconds)
    if rank == 0:
        start = store.add("parsimony/starts", 1)
        _welcome_all(store, start, world_size, seconds)
    else:
        me = uuid.uuid4().hex  # to which no answer can be an old one
        store.set(f"parsimony/hello/{rank}", me)
        store.wait([f"parsimony/welcome/{me}"], limit)
        start = int(store.get(f"parsimony/welcome/{me}"))
        store.set(f"parsimony/{start}/here/{rank}", b"")
        store.wait([f"parsimony/{start}/complete"], limit)
    return dist.PrefixStore(f"parsimony/{start}/{_num_made}", store)


def _welcome_all(store: Any, start: int, world_size: int, seconds: float) -> None:
    """Answer who says hello until each rank has heard it; one that is dead never does."""
    deadline, missing = time.monotonic() + seconds, set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"parsimony/hello/{rank}"]):
                who = store.get(f"parsimony/hello/{rank}").decode()
                store.set(f"parsimony/welcome/{who}", str(start))
            if store.check([f"parsimony/{start}/here/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not come within {seconds:g} s")
        time.sleep(_LOOK_EVERY)
    store.set(f"parsimony/{start}/complete", b"")
