"""An epoch that goes on with another number of ranks: each sample is seen once, by one of them."""

import io
import itertools
from collections import Counter

import pytest
import torch
from torch.utils.data import TensorDataset

from engine.sampling import make_batches
from workloads.text import text_folder
from workloads.text_stream import text_shards

LEGS = [(4, 3), (2, 4), (3, 3), (4, None)]  # ranks, and batches of each before the next; None: all


def saved(position):
    stream = io.BytesIO()
    torch.save(position, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def seen_by(make, epoch, legs, restart=True):
    """Return the batches that all ranks see of an epoch, in legs, and how many samples were left.

    make: (rank, world_size) -> Batches. restart: each rank is started again in mid-leg.
    """
    positions, first, seen, left = [{}] * legs[0][0], 0, [], None
    for world_size, num_batches in legs:
        ranks = [make(rank, world_size) for rank in range(world_size)]
        if len(positions) != world_size:
            positions = [saved(rank.take_over(epoch, first, positions)) for rank in ranks]
            first = 0
        counts = {rank.num_left(first, p) for rank, p in zip(ranks, positions, strict=True)}
        assert len(counts) == 1
        num_batches = counts.pop() if num_batches is None else num_batches
        for number, rank in enumerate(ranks):
            batches = rank.start(epoch, first, positions[number])
            for done in range(num_batches):
                if restart and done == num_batches // 2:
                    position = saved(rank.position())
                    rank = ranks[number] = make(number, world_size)
                    batches = rank.start(epoch, first + done, position)
                seen.append(next(batches))
            positions[number] = saved(rank.position())
        first += num_batches
        left = ranks[0].num_left(first, positions[0])
    return seen, left


@pytest.mark.parametrize("limit", [None, 301])
@pytest.mark.parametrize("epoch", [0, 2])
def test_of_images_each_is_seen_once(epoch, limit):
    data = TensorDataset(torch.arange(401))

    def make(rank, world_size):
        return make_batches(
            data, batch_size=5, rank=rank, world_size=world_size, seed=3, is_training=True,
            samples_per_epoch=limit, num_workers=0, pin_memory=False,
        )  # fmt: skip

    seen, left = seen_by(make, epoch, LEGS)
    samples = Counter(torch.cat([batch[0] for batch in seen]).tolist())
    assert set(samples.values()) == {1}
    assert left == 0
    assert len(samples) > (limit or 401) - 4 * 5


@pytest.mark.parametrize("limit", [None, 150])
def test_of_a_text_each_word_is_a_target_once(tmp_path, limit):
    for name, count in (("train", 3001), ("test", 9)):
        words = " ".join(f"w{number}" for number in range(count))
        (tmp_path / f"{name}.txt").write_text(words + "\n")
    split = text_folder(str(tmp_path), bptt=7)["train"]

    def make(rank, world_size):
        return split.batches(
            batch_size=3, rank=rank, world_size=world_size, seed=1, is_training=True,
            samples_per_epoch=limit,
        )  # fmt: skip

    seen, left = seen_by(make, 1, LEGS)
    pairs = Counter(
        pair
        for inputs, targets in seen
        for pair in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True)
    )
    assert set(pairs.values()) == {1}
    text = split._words.tolist()
    assert pairs.keys() <= set(itertools.pairwise(text))  # each before its own target
    assert left == 0
    whole = (limit or 3001 // 7) * 7
    assert whole - 3 * 4 * 3 * 7 < len(pairs) <= whole


def test_of_shards_each_line_is_read_once(tmp_path):
    """Short lines of many words each, so that reading keeps pace on all ranks."""
    (tmp_path / "train").mkdir()
    word = 0
    for shard in range(3):
        lines = []
        for _ in range(120):
            lines.append(" ".join(f"w{word + n:06}" for n in range(6)))
            word += 6
        (tmp_path / "train" / f"shard-{shard}").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.txt").write_text("w000001\n")
    split = text_shards(str(tmp_path), test="test.txt", bptt=4)["train"]

    def make(rank, world_size):
        return split.batches(
            batch_size=3, rank=rank, world_size=world_size, seed=1, is_training=True,
            samples_per_epoch=None,
        )  # fmt: skip

    seen, left = seen_by(make, 0, [(4, 20), (2, 15), (3, 10), (4, None)])
    end = split._vocabulary.end
    targets = Counter(t for _, batch in seen for t in batch.flatten().tolist() if t != end)
    assert left == 0
    twice = sum(count - 1 for count in targets.values())
    assert len(targets) > 0.9 * word
    assert twice < 0.05 * word  # a rank that is through with its lines begins them again
