"""Run by test_large_vocabulary.py: a million words, of which a step touches a few hundred.

Holds what those tests share: the model, the worker, and who watches it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgc import Compression, DistributedOptimizer, row_sparse_names
from dgc.comm.job import job
from optim import SM3, Adam, SketchAdam
from workloads.language_models import LSTMLanguageModel

NUM_WORDS, DIM, NUM_SAMPLES = 1_000_000, 8, 128
POSITIONS, TEXTS = 8, 8
OPTIMIZERS = {"SketchAdam": SketchAdam, "SM3": SM3, "Adam": Adam}
CLIPPED = Compression(density=1.0, momentum_correction=False, clip_norm=1e-3)

_LOOKUPS = {torch.ops.aten.embedding.default}
_generator_in_use = threading.Lock()  # torch has one for all threads


class Watch(TorchDispatchMode):
    """Notes the operators that make, or go over, a tensor of a byte a word or more.

    Allowed are lookups of rows, and views. Of sparse tensors, what they are made of counts. What
    native kernels do is not seen.
    """

    def __init__(self, limit_bytes: int = NUM_WORDS) -> None:
        super().__init__()
        self.limit_bytes, self.found, self.num_seen = limit_bytes, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        given, made = _parts((args, kwargs)), _parts(results)
        known = {part.untyped_storage().data_ptr() for part in given}
        new = [p for p in made if p.untyped_storage().data_ptr() not in known]
        self.num_seen += 1
        self.found += [f"{func} makes {tuple(p.shape)}" for p in new if self._is_large(p)]
        if not func.is_view and func not in _LOOKUPS:
            self.found += [f"{func} reads {tuple(p.shape)}" for p in given if self._is_large(p)]
        return results

    def _is_large(self, part: torch.Tensor) -> bool:
        return part.numel() * part.element_size() >= self.limit_bytes


def _parts(nested) -> list[torch.Tensor]:
    """Return the dense tensors that these are made of."""
    found = []
    for leaf in tree_leaves(nested):
        if isinstance(leaf, torch.Tensor):
            found += [leaf._indices(), leaf._values()] if leaf.is_sparse else [leaf]
    return found


def make_model() -> LSTMLanguageModel:
    with _generator_in_use:
        torch.manual_seed(0)
        return LSTMLanguageModel(
            NUM_WORDS, embedding_dim=DIM, hidden_dim=DIM, num_layers=1, dropout=0.0,
            softmax="sampled", num_samples=NUM_SAMPLES, sparse_embedding=True,
        )  # fmt: skip


def texts(step: int) -> torch.Tensor:
    """Return words and those that follow: (POSITIONS + 1, TEXTS)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(NUM_WORDS, (POSITIONS + 1, TEXTS), generator=generator)


class Worker:
    """A replica, which learns from its own columns of the texts."""

    def __init__(self, comm, name, compression=None, **settings) -> None:
        self.comm, self.model = comm, make_model()
        names = row_sparse_names(self.model)
        assert len(names) == 3, names
        self.optimizer = DistributedOptimizer(
            OPTIMIZERS[name](self.model.parameters(), lr=0.01, **settings),
            self.model.named_parameters(), comm=comm, compression=compression, row_sparse=names,
        )  # fmt: skip

    def backward(self, step: int) -> None:
        mine = texts(step).chunk(self.comm.world_size, dim=1)[self.comm.rank]
        self.optimizer.zero_grad()
        self.model(mine[:-1], mine[1:])[0].backward()

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def replica(self) -> list[torch.Tensor]:
        """Return all that must be equal on all ranks."""
        state = self.optimizer.state_dict()["state"]
        return [p.detach() for p in self.model.parameters()] + [
            value for kept in state.values() for value in kept.values()
        ]


def digests(tensors) -> list[str]:
    """Return what tells tensors apart that differ in a bit."""
    return [hashlib.sha1(tensor.contiguous().numpy()).hexdigest() for tensor in tensors]


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def rise(work) -> int:
    """Return by how many bytes resident memory rose at most while `work` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak until now
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def check(comm, name: str) -> None:
    worker = Worker(comm, name)
    torch.manual_seed(1 + comm.rank)  # of the sampled words
    for step in range(3):  # the first steps load code, and start threads
        worker.step(step)
    with Watch() as watch:
        worker.step(3)
    assert not watch.found, watch.found
    bound = 2 * NUM_WORDS  # bytes: half a column
    rises = [rise(lambda step=step: worker.step(step)) for step in range(4, 9)]
    assert min(rises) < bound, f"{name}: {rises} bytes"
    seen = rise(lambda: torch.ones(NUM_WORDS))
    assert seen > bound, f"{seen} bytes: a column would not have been noticed"
    mine = digests(worker.replica())
    for rank, theirs in enumerate(comm.all_gather_object(mine)):
        assert theirs == mine, f"{name}: ranks {rank} and {comm.rank} differ"
    print(f"rank {comm.rank} of {comm.world_size}: {name} takes {min(rises)} bytes", flush=True)


if __name__ == "__main__":
    with job() as comm:
        for name in OPTIMIZERS:
            check(comm, name)
