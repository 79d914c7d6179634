"""Which samples a rank sees, in which order, and how random transforms change them.

All of this depends only on the run's seed, the epoch and the sample. Augmentation is seeded by
(seed, epoch, index of the sample), so that a sample looks the same on any rank, in any loader
process, before and after a resume.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset


def seed_all(seed: int) -> None:
    """Seed the generators that models and transforms draw from on the CPU."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 20 times as long
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


def random_states() -> dict[str, Any]:
    """Return the states of torch's, Python's and numpy's generators: tensors and plain values."""
    _, keys, position, has_gauss, gauss = numpy.random.get_state()
    return {
        "torch": torch.default_generator.get_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.default_generator.set_state(states["torch"])
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy().astype("uint32"), *rest))


class _LoaderPickler(cloudpickle.Pickler):
    """Pickles for another process of this machine.

    Tensors go through shared memory; lambdas and local classes are pickled with their code.
    """

    dispatch_table: ClassVar = ChainMap(
        ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table
    )


def _restored(prepare: Callable[[], None] | None, data: bytes) -> SeededSamples:
    if prepare is not None:
        prepare()
    return SeededSamples(*pickle.loads(data), prepare)


class SeededSamples(Dataset):
    """A dataset indexed by (epoch, index), whose random transforms depend on these and the seed.

    Args: prepare: is called in each loader process before the dataset is unpickled there.
    """

    def __init__(
        self, dataset: Dataset[Any], seed: int, prepare: Callable[[], None] | None = None
    ) -> None:
        self._dataset, self._seed, self._prepare = dataset, seed, prepare

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        data = io.BytesIO()
        try:
            _LoaderPickler(data).dump((self._dataset, self._seed))
        except (TypeError, pickle.PicklingError) as error:
            raise TypeError(
                f"the dataset cannot be given to loader processes ({error}); open what it holds "
                f"when a sample is first read, or set configs.data.num_workers_per_rank to 0"
            ) from error
        return _restored, (self._prepare, data.getvalue())

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed = hash((self._seed, epoch, index)) & 0x7FFFFFFFFFFFFFFF
        before = random_states()
        seed_all(seed)
        try:
            sample = self._dataset[index]
        except Exception as error:
            error.add_note(f"This was sample {index}{_file_of(self._dataset, index)}")
            raise
        set_random_states(before)
        return sample


def _file_of(dataset: Any, index: int) -> str:
    """Return words for a message: the file of a sample of an image folder or a Subset of one."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        file = dataset.samples[index][0]  # an attribute of torchvision's image folders
    except (AttributeError, IndexError, KeyError, TypeError):
        return ""
    if not isinstance(file, (str, os.PathLike)):
        return ""
    return f", from the file {os.fspath(file)}: if it cannot be read, replace or remove it"


class EpochSampler(Sampler):
    """A rank's part of each epoch's shuffled samples, beginning at any of them.

    The ranks take samples in turns, so that what they have taken is always the first of the epoch,
    however many ranks there are.
    Args: limit: the most samples of an epoch over all ranks; None: no limit.
    """

    def __init__(
        self, num_samples: int, rank: int, world_size: int, seed: int, limit: int | None
    ) -> None:
        self._shuffled = DistributedSampler(range(num_samples), 1, 0, shuffle=True, seed=seed)
        self._rank, self._world_size = rank, world_size
        self._num = num_samples if limit is None else min(num_samples, limit)
        self.epoch = self.taken = 0

    def start(self, epoch: int, taken: int) -> None:
        """Let the next iteration begin after the epoch's first `taken` samples, of all ranks."""
        self.epoch, self.taken = epoch, taken

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self._shuffled.set_epoch(self.epoch)
        left = list(self._shuffled)[self.taken : self._num]
        order = left[self._rank :: self._world_size][: len(left) // self._world_size]
        return iter([(self.epoch, index) for index in order])

    def num_left(self, taken: int) -> int:
        """Return how many samples each rank has after the first `taken` of all ranks."""
        return (self._num - taken) // self._world_size

    def __len__(self) -> int:
        return self.num_left(self.taken)


class _EveryNth(Sampler):
    """Every world_size-th sample, for evaluation: each sample is seen by exactly one rank."""

    def __init__(self, num_samples: int, rank: int, world_size: int) -> None:
        self._keys = [(0, index) for index in range(rank, num_samples, world_size)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class SampleBatches:
    """Batches of a DataLoader, which loads sample by sample; see interfaces.Batches.

    A position is {}, or {"taken": samples of the epoch that all ranks have trained on} where other
    ranks began it.
    Args: sampler: of batches to train on; None: every rank's are evaluated from the first.
    """

    def __init__(
        self,
        loader: DataLoader,
        batch_size: int,
        world_size: int,
        sampler: EpochSampler | None = None,
    ) -> None:
        self._loader, self._sampler, self._world_size = loader, sampler, world_size
        self.num_batches, self.samples_per_batch = len(loader), batch_size
        self._position: dict[str, Any] = {}

    def start(self, epoch: int, first: int, position: Mapping[str, Any]) -> Iterator[Any]:
        self._position = dict(position)
        if self._sampler is not None:
            self._sampler.start(epoch, self._where(first, position, self._world_size))
        return self._counted() if position else iter(self._loader)

    def _counted(self) -> Iterator[Any]:
        for batch in self._loader:
            self._position["taken"] += self.samples_per_batch * self._world_size
            yield batch

    def num_left(self, first: int, position: Mapping[str, Any]) -> int:
        if self._sampler is None:
            return self.num_batches
        taken = self._where(first, position, self._world_size)
        return self._sampler.num_left(taken) // self.samples_per_batch

    def position(self) -> dict[str, Any]:
        return dict(self._position)

    def take_over(
        self, epoch: int, first: int, positions: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {"taken": self._where(first, positions[0], len(positions))}

    def _where(self, first: int, position: Mapping[str, Any], world_size: int) -> int:
        return position.get("taken", first * self.samples_per_batch * world_size)


def make_batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    is_training: bool,
    samples_per_epoch: int | None,
    num_workers: int,
    pin_memory: bool,
    prepare_worker: Callable[[], None] | None = None,
) -> SampleBatches:
    """Return batches of this rank's part of the samples.

    For training: full batches of shuffled samples, the same number on all ranks. For evaluation:
    every sample once, over all ranks.
    Args: prepare_worker: see `prepare` of SeededSamples.
    """
    if not is_training:
        every_nth = _EveryNth(len(dataset), rank, world_size)
        samples = SeededSamples(dataset, 0, prepare_worker)
        loader = _loader(samples, every_nth, batch_size, num_workers, pin_memory, drop_last=False)
        return SampleBatches(loader, batch_size, world_size)
    sampler = EpochSampler(len(dataset), rank, world_size, seed, samples_per_epoch)
    samples = SeededSamples(dataset, seed, prepare_worker)
    loader = _loader(samples, sampler, batch_size, num_workers, pin_memory, drop_last=True)
    return SampleBatches(loader, batch_size, world_size, sampler)


def _let_children_import_this() -> None:
    """Let the fork server find engine.fork_server from any folder: it is not told our sys.path."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *paths])


def _loader(
    dataset: Dataset[Any],
    sampler: Sampler,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool,
) -> DataLoader:
    # A forked rank would bring the memory maps of MPI and Horovod without their threads. The fork
    # server is a fresh process that has imported torch, once for all loaders.
    context = multiprocessing.get_context("forkserver") if num_workers else None
    if context is not None:
        _let_children_import_this()
        context.set_forkserver_preload(["engine.fork_server", "torch.utils.data"])
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=context,
        generator=torch.Generator(),  # or each epoch's start would draw from the default generator
    )
