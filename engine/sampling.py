"""Which samples a rank sees, in which order, and how they are made: a function of seed and place.

Augmentation is seeded by (seed, epoch, index of the sample), so a sample looks the same whoever
loads it, in whichever process, before or after a resume.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import cloudpickle
import numpy
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset


def seed_all(seed: int) -> None:
    """Seed the generators that models and transforms draw from on the CPU."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 20 times as much
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)


def random_states() -> dict[str, Any]:
    """Return the states of torch's, Python's and numpy's generators: tensors and plain values."""
    _, keys, place, has_gauss, gauss = numpy.random.get_state()
    return {
        "torch": torch.default_generator.get_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype("int64")), place, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.default_generator.set_state(states["torch"])
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    numpy.random.set_state(("MT19937", keys.numpy().astype("uint32"), *rest))


class _LoaderPickler(cloudpickle.Pickler):
    """Pickles for a process of this machine: tensors in shared memory, lambdas and local classes
    by their code."""

    dispatch_table: ClassVar = ChainMap(
        ForkingPickler._extra_reducers, cloudpickle.Pickler.dispatch_table
    )


def _restored(prepare: Callable[[], None] | None, data: bytes) -> SeededSamples:
    if prepare is not None:
        prepare()
    return SeededSamples(*pickle.loads(data), prepare)


class SeededSamples(Dataset):
    """A dataset addressed by (epoch, index), whose random transforms depend on nothing else.

    Args: prepare: called in each loader process before the dataset is unpickled there.
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

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
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
    """Say which file a sample of an image folder, or of a part of one, is made from."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        file = dataset.samples[index][0]  # as torchvision's folders have it
    except (AttributeError, IndexError, KeyError, TypeError):
        return ""
    if not isinstance(file, (str, os.PathLike)):
        return ""
    return f", from the file {os.fspath(file)}: if it cannot be read, replace or remove it"


class EpochSampler(Sampler):
    """A rank's share of each epoch's shuffled samples, from any position on."""

    def __init__(
        self, num_samples: int, rank: int, world_size: int, seed: int, limit: int | None
    ) -> None:
        self._shares = DistributedSampler(
            range(num_samples), world_size, rank, shuffle=True, seed=seed, drop_last=True
        )
        self._num = self._shares.num_samples
        if limit is not None:
            self._num = min(self._num, limit // world_size)
        self.epoch = self.first = 0

    def start(self, epoch: int, first: int) -> None:
        """Begin the next iteration at this rank's sample number `first` of `epoch`."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self._shares.set_epoch(self.epoch)
        order = list(self._shares)[self.first : self._num]
        return iter([(self.epoch, index) for index in order])

    def __len__(self) -> int:
        return self._num


class _EveryNth(Sampler):
    """All samples, each on one rank only: for evaluation."""

    def __init__(self, num_samples: int, rank: int, world_size: int) -> None:
        self._places = [(0, index) for index in range(rank, num_samples, world_size)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class SampleBatches:
    """Batches of samples that a DataLoader loads one by one; see interfaces.Batches."""

    def __init__(
        self, loader: DataLoader, batch_size: int, sampler: EpochSampler | None = None
    ) -> None:
        self._loader, self._sampler = loader, sampler
        self.num_batches, self.samples_per_batch = len(loader), batch_size

    def start(self, epoch: int, first: int, position: Any) -> Iterator[Any]:
        if self._sampler is not None:
            self._sampler.start(epoch, first * self.samples_per_batch)
        return iter(self._loader)

    def position(self) -> dict[str, Any]:
        return {}


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
    """Return batches of this rank's share of the samples.

    In training: whole batches of shuffled samples, as many on all ranks. Else every sample once.
    Args: prepare_worker: as `prepare` of SeededSamples.
    """
    if not is_training:
        places = _EveryNth(len(dataset), rank, world_size)
        samples = SeededSamples(dataset, 0, prepare_worker)
        loader = _loader(samples, places, batch_size, num_workers, pin_memory, drop_last=False)
        return SampleBatches(loader, batch_size)
    sampler = EpochSampler(len(dataset), rank, world_size, seed, samples_per_epoch)
    samples = SeededSamples(dataset, seed, prepare_worker)
    loader = _loader(samples, sampler, batch_size, num_workers, pin_memory, drop_last=True)
    return SampleBatches(loader, batch_size, sampler)


def _end_with_rank(worker: int) -> None:
    """In a loader process: end when its rank does, even if that is killed.

    Torch waits for another parent, but the parent is the fork server, which lives as long as this.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _loader(
    dataset: Dataset[Any],
    sampler: Sampler,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool,
) -> DataLoader:
    # A fork would copy MPI's and Horovod's threads and memory maps; a fresh process that has
    # imported torch once copies neither.
    context = multiprocessing.get_context("forkserver") if num_workers else None
    if context is not None:
        context.set_forkserver_preload(["torch.utils.data"])
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        multiprocessing_context=context,
        worker_init_fn=_end_with_rank,
        generator=torch.Generator(),  # so that starting an epoch draws nothing from the model's
    )
