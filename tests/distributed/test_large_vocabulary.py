"""A million words end to end: rows are found, exchanged and applied, never the whole table."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dgc.comm.local import run_local
from tests import jobs
from tests.distributed.check_large_vocabulary import (
    CLIPPED,
    NUM_SAMPLES,
    NUM_WORDS,
    OPTIMIZERS,
    POSITIONS,
    TEXTS,
    Watch,
    Worker,
    make_model,
    texts,
)
from tests.long import long
from tests.tolerances import assert_close

PROGRAM = str(Path(__file__).with_name("check_large_vocabulary.py"))
NUM_STEPS = 3


# ---- the watch itself ----------------------------------------------------------------------------


def test_the_watch_sees_a_dense_gradient():
    model = make_model()
    model.embedding.sparse = False
    words = texts(0)
    with Watch() as watch:
        model(words[:-1], words[1:])[0].backward()
    assert any("embedding_dense_backward" in what for what in watch.found)


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda table: table.isfinite(), "makes"),
        (lambda table: table.sum(), "reads"),
        (lambda table: table.mul_(0.5), "reads"),
        (lambda table: torch.zeros(len(table), dtype=torch.bool), "makes"),
    ],
)
def test_the_watch_sees_a_walk_over_the_table(work, what):
    table = torch.zeros(NUM_WORDS, 2)
    with Watch() as watch:
        work(table)
    assert any(what in found for found in watch.found)


def test_the_watch_passes_rows_and_views():
    table = nn.Embedding(NUM_WORDS, 2, sparse=True)
    with Watch() as watch:
        table(torch.tensor([5, 5, 9])).sum().backward()
        table.weight.grad.coalesce()
        table.weight.detach()[3:7].view(-1).mul_(2)
    assert not watch.found and watch.num_seen > 5


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipped_by", ["each worker", "all together"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_nothing_of_the_tables_size_is_made_or_gone_over(num_workers, name, clipped_by):
    def work(comm):
        worker = Worker(comm, name, CLIPPED if clipped_by == "each worker" else None)
        with Watch() as watch:  # torch's modes are a thread's own
            for step in range(NUM_STEPS):
                worker.backward(step)
                if clipped_by == "all together":
                    worker.optimizer.clip_grad_norm_(1e-3)
                worker.optimizer.step()
        return watch.found, watch.num_seen, worker.optimizer.stats.row_bytes

    for found, num_seen, row_bytes in run_local(num_workers, work):
        assert not found
        assert num_seen > 100 and row_bytes > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replicas_stay_equal_to_the_bit(name):
    def work(comm):
        worker = Worker(comm, name)
        before = worker.model.embedding.weight.detach().clone()
        for step in range(NUM_STEPS):
            worker.step(step)
        assert not torch.equal(before, worker.model.embedding.weight)
        return worker.replica()

    mine, theirs = run_local(2, work)
    assert len(mine) == len(theirs) > 8
    for here, there in zip(mine, theirs, strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_rows_that_were_touched_move(name):
    def work(comm):
        worker = Worker(comm, name)
        before = worker.model.embedding.weight.detach().clone()
        worker.step(0)
        return (worker.model.embedding.weight != before).any(1).nonzero()[:, 0]

    moved = run_local(2, work)[0]
    assert torch.equal(moved, texts(0)[:-1].unique())


# ---- two workers on halves of a batch -----------------------------------------------------------


def learn(num_workers, name):
    """Return the rows' mean gradients of the first step, and the model after three."""

    def work(comm):
        # eps: where a gradient is nearly 0, Adam would make a sign of a rounding
        worker = Worker(comm, name, **({} if name == "SM3" else {"eps": 1e-3}))
        drawn = iter([sampled_words(step) for step in range(NUM_STEPS)])
        worker.model.softmax.draw = lambda device: next(drawn)
        gradients = {}
        for step in range(NUM_STEPS):
            worker.backward(step)
            worker.optimizer.synchronize()
            if step == 0:
                gradients = {n: p.grad for n, p in worker.model.named_parameters()}
            worker.optimizer.step()
        return gradients, dict(worker.model.named_parameters())

    return run_local(num_workers, work)[0]


def sampled_words(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(5000, (NUM_SAMPLES,), generator=generator).sort().values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_workers_on_halves_do_what_one_does_on_all(name):
    """Each half has as many words, so that the mean of the halves' means is the joined mean."""
    one, two = learn(1, name), learn(2, name)
    rows = {}
    for parameter, expected in one[0].items():
        actual = two[0][parameter]
        assert actual.is_sparse == expected.is_sparse != parameter.startswith("layers")
        if expected.is_sparse:
            rows[parameter] = expected.indices()[0]
            assert torch.equal(actual.indices()[0], rows[parameter])
            actual, expected = actual.values(), expected.values()
        assert expected.abs().max() > 1e-4
        assert_close(actual, expected)
    assert torch.equal(rows["embedding.weight"], texts(0)[:-1].unique())
    touched = torch.cat([texts(0)[1:].flatten(), sampled_words(0)]).unique()
    assert torch.equal(rows["softmax.weight.weight"], touched)
    assert POSITIONS * TEXTS < len(touched) <= POSITIONS * TEXTS + NUM_SAMPLES
    for parameter, expected in one[1].items():
        assert_close(two[1][parameter].detach(), expected.detach())


# ---- real ranks ----------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "num_ranks"), [long("horovodrun", 1), ("horovodrun", 2), long("torchrun", 2)]
)
def test_real_ranks_take_no_memory_of_the_tables_size(launcher, num_ranks, tmp_path, monkeypatch):
    """Resident memory also shows what native kernels, Horovod and gloo take."""
    for name in ("MMAP_THRESHOLD_", "TRIM_THRESHOLD_"):  # freed memory goes back at once
        monkeypatch.setenv(f"MALLOC_{name}", "65536")
    outcome = jobs.run(launcher, num_ranks, [PROGRAM], tmp_path / "log", timeout=240)
    assert outcome.status == 0, outcome.output[-5000:]
    for rank in range(num_ranks):
        for name in OPTIMIZERS:
            assert f"rank {rank} of {num_ranks}: {name} takes" in outcome.output
