import pytest
import torch

from engine.sampling import SeededSamples, make_batches
from workloads.masked_text import masked_text_folder, masked_wikitext


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(50, (20_000,), generator=generator).tolist()
    (tmp_path / "train.txt").write_text(" ".join(f"w{word}" for word in words))
    (tmp_path / "test.txt").write_text(" ".join(f"w{word}" for word in words[:1000]))
    return tmp_path


def test_words_to_guess_are_masked_changed_and_kept_in_the_published_shares(folder):
    train = masked_text_folder(str(folder), sequence_length=100)["train"]
    mask = train.facts["num_words"] - 1
    assert mask == 52  # 50 words, <eos>, <unk>
    counts = train.facts["word_counts"]
    assert (len(counts), int(counts[mask]), int(counts.sum())) == (53, 0, 20_001)
    torch.manual_seed(1)
    samples = [train[index] for index in range(200)]
    inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
    assert inputs.shape == targets.shape == (200, 100)
    assert inputs.dtype == targets.dtype == torch.int64
    guessed = targets != -100
    assert (guessed.sum(dim=1) == 15).all()
    assert torch.equal(torch.where(guessed, targets, inputs), train._samples.long())
    assert not (inputs[~guessed] == mask).any()
    shown, wanted = inputs[guessed], targets[guessed]
    # 3,000 words: one standard deviation of a share is 0.0073 at 0.8, 0.0055 at 0.1
    share_masked = (shown == mask).double().mean()
    assert abs(share_masked - 0.8) < 4 * 0.0073
    share_kept = (shown == wanted).double().mean()
    assert abs(share_kept - (0.1 + 0.1 / 52)) < 4 * 0.0056
    changed = shown[(shown != mask) & (shown != wanted)]
    assert len(changed.unique()) > 40
    places = guessed.sum(dim=0).double()  # 30 expected at each
    assert places.min() > 8 and places.max() < 60


def test_a_sample_depends_on_torchs_generator_alone(folder):
    train = masked_text_folder(str(folder))["train"]
    torch.manual_seed(1)
    first = train[3]
    torch.manual_seed(1)
    assert all(map(torch.equal, train[3], first))
    assert not torch.equal(train[3][0], first[0])
    seeded = SeededSamples(train, 5)
    assert all(map(torch.equal, seeded[0, 3], seeded[0, 3]))
    assert not torch.equal(seeded[0, 3][1], seeded[1, 3][1])


def test_evaluation_is_the_same_each_time_and_loads_as_batches(folder):
    test = masked_text_folder(str(folder))["test"]
    assert len(test) == 1001 // 128
    batches = make_batches(
        test,
        batch_size=4,
        rank=0,
        world_size=1,
        seed=0,
        is_training=False,
        samples_per_epoch=None,
        num_workers=0,
        pin_memory=False,
    )
    first, again = (list(batches.start(0, 0, {})) for _ in range(2))
    assert [batch[0].shape for batch in first] == [(4, 128), (3, 128)]
    for ours, theirs in zip(first, again, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_limit_on_words_counts_the_mask(folder):
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("a b c d a b c a b a\n" * 13)
    splits = masked_wikitext(str(folder), max_words=5, sequence_length=8, download=False)
    assert set(splits) == {"train", "valid", "test"}
    facts = splits["valid"].facts
    assert facts["num_words"] == len(facts["word_counts"]) == 5
    # a 4, b 3, and c 2 with d 1 as <unk>, <eos> 1 of a line
    assert facts["word_counts"].tolist() == [52, 39, 39, 13, 0]


def test_settings_out_of_range_are_refused(folder):
    with pytest.raises(ValueError, match=r"mask_fraction is 1.0; allowed: between 0 and 1"):
        masked_text_folder(str(folder), mask_fraction=1.0)
    with pytest.raises(ValueError, match=r"sequence_length is 1; allowed: 2"):
        masked_text_folder(str(folder), sequence_length=1)
    with pytest.raises(ValueError, match=r"1001 words does not fill one sample of 1024; lower"):
        masked_text_folder(str(folder), sequence_length=1024)
    with pytest.raises(FileNotFoundError, match=r"--configs.dataset.root FOLDER"):
        masked_text_folder(str(folder / "nothing"))
