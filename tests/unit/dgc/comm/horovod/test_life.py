import logging
import os
import types

import pytest

from dgc.comm.horovod import life


class Horovod:
    """What life.py asks of horovod.torch."""

    def __init__(self, size=3, rank=0, is_up=False):
        self.is_up, self.size, self.rank = is_up, lambda: size, lambda: rank
        self.mpi_ops = types.SimpleNamespace(join=lambda device=-1: "joined", _handle_map={})

    def is_initialized(self):
        return self.is_up

    def init(self):
        self.is_up, self.mpi_ops._handle_map = True, {}

    def shutdown(self):
        self.is_up = False


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name, value in (("_num_open", 0), ("_own_life", None), ("_codes", []),
                        ("_is_fusion_known", False), ("_is_fusion_noted", False)):  # fmt: skip
        monkeypatch.setattr(life, name, value)
    for name in ("HOROVOD_ELASTIC", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_DYNAMIC_PROCESS_SETS"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
        monkeypatch.delenv(name)


def test_the_last_one_ends_what_the_first_began():
    hvd = Horovod()
    life.enter(hvd)
    life.enter(hvd)
    life.leave(hvd)
    assert hvd.is_up
    life.leave(hvd)
    assert not hvd.is_up


def test_what_a_person_began_goes_on():
    hvd = Horovod(is_up=True)
    life.enter(hvd)
    life.leave(hvd)
    assert hvd.is_up
    hvd.shutdown()
    assert int(os.environ["HOROVOD_FUSION_THRESHOLD"]) == 128 * 2**20  # what it began with
    life.enter(hvd)
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "0"  # what this life begins with
    hvd.shutdown()
    hvd.init()  # a person's, in place of ours
    life.leave(hvd)
    assert hvd.is_up


def test_join_is_refused_while_there_is_a_comm():
    hvd = Horovod()
    join = hvd.mpi_ops.join
    for _ in range(2):
        life.enter(hvd)
    life.leave(hvd)
    with pytest.raises(RuntimeError, match="takes no part in gathers.*drop_last"):
        join()
    life.leave(hvd)
    assert join() == "joined"


def test_elastic_jobs_are_refused(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(RuntimeError, match="residuals.*--host-discovery-script"):
        life.enter(Horovod())
    monkeypatch.setenv("HOROVOD_ELASTIC", "0")
    life.enter(Horovod())


@pytest.mark.parametrize(
    ("size", "rank", "is_up", "threshold", "is_told"),
    [
        (3, 0, True, None, True), (3, 0, True, "0", False), (3, 0, True, "67108864", True),
        (3, 0, False, None, False), (3, 0, False, "1024", True), (2, 0, True, None, False),
        (3, 1, True, None, False),
    ],
)  # fmt: skip
def test_fusion_is_told_of_once_where_sums_depend_on_it(
    size, rank, is_up, threshold, is_told, monkeypatch, caplog
):
    if threshold is not None:
        monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", threshold)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            life.enter(Horovod(size, rank, is_up))
    told = [r.getMessage() for r in caplog.records if "tensor fusion is on" in r.getMessage()]
    assert len(told) == is_told
    assert not told or "HOROVOD_FUSION_THRESHOLD=0 before hvd.init()" in told[0]


def mpi(nodes, size):
    return {"OMPI_MCA_orte_num_nodes": nodes, "OMPI_COMM_WORLD_SIZE": size}


def gloo(size, local, cross):
    return {"HOROVOD_SIZE": size, "HOROVOD_LOCAL_SIZE": local, "HOROVOD_CROSS_SIZE": cross}


@pytest.mark.parametrize(
    ("environment", "may_be"),
    [
        ({}, False), (mpi(1, 4), False), (mpi(4, 4), False), (mpi(2, 4), True), (mpi(2, 3), True),
        (gloo(4, 4, 1), False), (gloo(4, 1, 4), False), (gloo(4, 2, 2), True),
        (gloo(3, 2, 2), True), (gloo(3, 2, 1), True), (gloo(3, 1, 2), True),  # nodes of 2 and 1
        ({"PMI_RANK": 0}, True),
    ],
)  # fmt: skip
def test_process_sets_are_asked_for_where_nodes_may_be_islands(environment, may_be, monkeypatch):
    for name in (*life._COUNTS, "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    life.enter(Horovod())
    assert ("HOROVOD_DYNAMIC_PROCESS_SETS" in os.environ) == may_be
