import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import traceback
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from engine.sampling import (
    SeededSamples,
    make_batches,
    random_states,
    seed_all,
    set_random_states,
)
from workloads.vision import torchvision


class Noisy(Dataset):
    """Samples whose augmentation draws from all global random states."""

    def __len__(self):
        return 103

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), random.random(), numpy.random.rand()]
        return torch.tensor([index, *draws])


def loader(rank=0, world_size=2, num_workers=0, limit=None, batch_size=8):
    return make_batches(
        Noisy(), batch_size=batch_size, rank=rank, world_size=world_size, seed=1, is_training=True,
        num_workers=num_workers, samples_per_epoch=limit, pin_memory=False,
    )  # fmt: skip


def epoch_of(batches, epoch, first=0):
    return torch.cat(list(batches.start(epoch, first, batches.position())))


def test_ranks_share_an_epoch_without_overlap_in_another_order_each_time():
    shares = [epoch_of(loader(rank), 0)[:, 0].tolist() for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 48  # 6 whole batches of 8 out of 51
    assert not set(shares[0]) & set(shares[1])
    assert epoch_of(loader(), 1)[:, 0].tolist() != shares[0]


def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have():
    whole = epoch_of(loader(), 3)
    rest = epoch_of(loader(), 3, first=2)
    assert torch.equal(rest, whole[16:])  # the same samples with the same augmentation


def test_augmentation_does_not_depend_on_who_loads():
    assert torch.equal(epoch_of(loader(num_workers=2), 0), epoch_of(loader(), 0))


def test_augmentation_differs_between_epochs():
    samples = SeededSamples(Noisy(), seed=1)
    assert not torch.equal(samples[(0, 5)], samples[(1, 5)])
    assert torch.equal(samples[(0, 5)], samples[(0, 5)])


def test_loading_leaves_the_models_random_states_alone():
    seed_all(5)
    expected = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    seed_all(5)
    epoch_of(loader(), 0)
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == expected


def test_random_states_survive_a_file(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    expected = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == expected


def test_samples_per_epoch_limits_all_ranks_together():
    assert len(epoch_of(loader(limit=40), 0)) == 16  # 20 a rank: two whole batches of 8


def test_evaluation_sees_every_sample_once():
    seen = []
    for rank in range(3):
        batches = make_batches(
            Noisy(), batch_size=8, rank=rank, world_size=3, seed=1, is_training=False,
            num_workers=0, samples_per_epoch=None, pin_memory=False,
        )  # fmt: skip
        seen += epoch_of(batches, 0)[:, 0].tolist()
    assert sorted(seen) == list(range(103))


def test_loader_processes_get_code_by_value_and_tensors_in_shared_memory():
    class Local(Dataset):
        def __init__(self):
            self.images, self.transform = torch.zeros(10**6), lambda x: x + 1

    data = bytes(ForkingPickler.dumps(SeededSamples(Local(), 1)))
    assert len(data) < 10**5
    assert pickle.loads(data)._dataset.transform(1) == 2


def test_a_dataset_that_no_process_can_be_given_says_what_to_do():
    noisy = Noisy()
    noisy.lock = threading.Lock()
    with pytest.raises(TypeError, match="open what it holds when a sample is first read, or set"):
        ForkingPickler.dumps(SeededSamples(noisy, 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, num_workers):
    file = tmp_path / "cat" / "7.png"
    file.parent.mkdir()
    noise = numpy.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(file)
    os.truncate(file, 3000)
    batches = make_batches(
        Subset(torchvision.datasets.ImageFolder(tmp_path, numpy.asarray), [0]), batch_size=1,
        rank=0, world_size=1, seed=1, is_training=True, samples_per_epoch=None,
        num_workers=num_workers, pin_memory=False,
    )  # fmt: skip
    with pytest.raises(OSError) as caught:
        next(batches.start(0, 0, {}))
    told = "".join(traceback.format_exception(caught.value))
    assert f"This was sample 0, from the file {file}: if it cannot be read, replace" in told


def test_loader_processes_end_with_a_rank_that_is_killed():
    code = (
        "import os, signal\n"
        "from tests.unit.engine.test_sampling import loader\n"
        "batches = loader(num_workers=1).start(0, 0, {})\n"
        "next(batches)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n" + code
    words = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    killed = subprocess.run(  # from any folder
        words, env=environment, cwd="/", stdout=subprocess.PIPE, timeout=60
    )
    # It has returned, so neither a loader process nor their server holds its output any more.
    assert killed.returncode == -signal.SIGKILL
