import hashlib
import shutil
import zipfile

import pytest
import torch

from workloads import text
from workloads.text import Text, text_folder, wikitext

NOT_COUNTED = -100


def make_text(num_words, bptt):
    """Every word is its own place in the text."""
    return Text(torch.arange(num_words, dtype=torch.int32), {"num_words": num_words}, bptt)


def ranks(split, world_size, batch_size, *, is_training=True, limit=None, seed=3):
    return [
        split.batches(
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            is_training=is_training,
            samples_per_epoch=limit,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_words", [2, 3, 31, 32, 33, 1000, 1025])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_evaluation_counts_each_target_once_over_all_ranks(num_words, batch_size, world_size):
    every = ranks(make_text(num_words, 5), world_size, batch_size, is_training=False)
    assert len({batches.num_batches for batches in every}) == 1
    targets = []
    for batches in every:
        epoch = list(batches.start(0, 0, {}))
        assert len(epoch) == batches.num_batches >= 1
        for inputs, wanted in epoch:
            assert inputs.shape == wanted.shape == (5, batch_size)
            assert inputs.dtype == wanted.dtype == torch.int64
            counted = wanted != NOT_COUNTED
            assert torch.equal(wanted[counted], inputs[counted] + 1)
            assert inputs.min() >= 0
            targets += wanted[counted].tolist()
    assert sorted(targets) == list(range(1, num_words))


@pytest.mark.parametrize("is_training", [True, False])
def test_columns_go_on_from_batch_to_batch_and_targets_are_the_next_words(is_training):
    for batches in ranks(make_text(1025, 7), 2, 3, is_training=is_training):
        epoch = list(batches.start(1, 0, {}))
        inputs = torch.cat([words for words, _ in epoch])
        targets = torch.cat([targets for _, targets in epoch])
        counted = targets != NOT_COUNTED
        assert torch.equal(targets[counted], inputs[counted] + 1)
        assert torch.equal(inputs[1:][counted[1:]], inputs[:-1][counted[1:]] + 1)


def test_ranks_train_on_text_of_their_own_and_only_ends_of_columns_are_left_out():
    every = ranks(make_text(1000, 7), 3, 4)
    seen = [words for batches in every for words, _ in batches.start(0, 0, {})]
    words = torch.cat([batch.flatten() for batch in seen])
    assert len(words.unique()) == len(words)
    assert 1000 - 12 * 7 - 12 <= len(words) <= 1000
    assert all(batch.shape == (7, 4) and batch.is_contiguous() for batch in seen)
    assert {batches.num_batches for batches in every} == {999 // 12 // 7}
    assert every[0].samples_per_batch == 4


@pytest.mark.parametrize("limit", [None, 40])
def test_an_epoch_taken_up_anywhere_is_the_same_from_there_on(limit):
    for batches in ranks(make_text(1000, 7), 2, 4, limit=limit):
        for epoch in (0, 3):
            whole = list(batches.start(epoch, 0, {}))
            assert batches.position() == {}
            for first in range(batches.num_batches + 1):
                rest = list(batches.start(epoch, first, {}))
                assert len(rest) == len(whole) - first
                for ours, theirs in zip(rest, whole[first:], strict=True):
                    assert all(map(torch.equal, ours, theirs))


def test_a_limit_counts_all_ranks_and_epochs_see_different_parts():
    first, second = ranks(make_text(10_000, 7), 2, 4, limit=50)
    assert first.num_batches == second.num_batches == 50 // 8
    begins = {int(next(first.start(epoch, 0, {}))[0][0, 0]) for epoch in range(8)}
    assert len(begins) >= 6 and max(begins) > 300
    assert next(first.start(2, 0, {}))[0][0, 0] == next(first.start(2, 0, {}))[0][0, 0]
    other_seed = ranks(make_text(10_000, 7), 2, 4, limit=50, seed=4)[0]
    assert begins != {int(next(other_seed.start(e, 0, {}))[0][0, 0]) for e in range(8)}


def test_a_text_too_short_is_refused_with_the_remedy():
    exact = make_text(2 * 3 * 5 + 1, 5)
    assert ranks(exact, 2, 3)[1].num_batches == 1
    with pytest.raises(ValueError, match=r"30 words do not fill one batch of 3 texts.*lower confi"):
        ranks(make_text(30, 5), 2, 3)
    with pytest.raises(ValueError, match=r"at most 5 texts an epoch.*configs.data.samples_per_ep"):
        ranks(exact, 2, 3, limit=5)
    for is_training in (True, False):
        for num_words in (0, 1):
            with pytest.raises(ValueError, match=rf"a text of {num_words} words has none to pre"):
                ranks(make_text(num_words, 5), 1, 1, is_training=is_training)
    with pytest.raises(ValueError, match=r"bptt is 0; allowed: 1"):
        make_text(30, 0)


def write(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in zip(("train", "valid", "test"), names, strict=True):
        (folder / name).write_text(f" a text to {split} \n the text \n")
    return folder


PLAIN = ("train.txt", "valid.txt", "test.txt")
PUBLISHED = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")


@pytest.mark.parametrize("names", [PLAIN, PUBLISHED])
@pytest.mark.parametrize("below", ["", "wikitext-103"])
def test_wikitext_is_found_in_the_layouts_it_comes_in(tmp_path, names, below):
    write(tmp_path / below, names)
    splits = wikitext(str(tmp_path), "wikitext-103", bptt=2, download=False)
    assert {split: len(words) for split, words in splits.items()} == dict(train=8, valid=8, test=8)
    facts = splits["test"].facts
    assert facts["num_words"] == 7  # text <eos> a to train the <unk>
    assert facts["word_counts"].tolist() == [2, 2, 1, 1, 1, 1, 0]
    assert wikitext(str(tmp_path), "wikitext-103", max_words=3)["train"].facts["num_words"] == 3


def test_missing_wikitext_is_told_with_where_it_looked_and_the_remedy(tmp_path):
    write(tmp_path, PLAIN)
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"wiki.train.tokens.*--configs.dataset.root FOLD"):
        wikitext(str(tmp_path), download=False)
    with pytest.raises(ValueError, match=r"name is 'wikitext-3'; allowed: wikitext-2, wikitext-10"):
        wikitext(str(tmp_path), "wikitext-3")


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Puts an archive in the published one's place."""
    source = write(tmp_path / "source", PUBLISHED)
    with zipfile.ZipFile(tmp_path / "wikitext-2-v1.zip", "w") as archive:
        for name in PUBLISHED:
            archive.write(source / name, f"wikitext-2/{name}")
    sha1 = {name: hashlib.sha1((source / name).read_bytes()).hexdigest() for name in PUBLISHED}
    shutil.rmtree(source)
    monkeypatch.setitem(text._SHA1, "wikitext-2", sha1)
    here = tmp_path.as_uri()
    monkeypatch.setattr(text, "_MIRRORS", (f"{here}/gone.zip", here + "/{name}-v1.zip"))
    return sha1


def test_wikitext_is_downloaded_from_the_first_address_that_has_it(tmp_path, archive):
    root = tmp_path / "data"
    assert len(wikitext(str(root))["train"]) == 8
    assert sorted(p.name for p in (root / "wikitext-2").iterdir()) == sorted(PUBLISHED)
    (tmp_path / "wikitext-2-v1.zip").unlink()
    assert len(wikitext(str(root))["train"]) == 8


def test_a_download_of_other_files_is_refused_and_leaves_nothing(tmp_path, archive):
    archive["wiki.test.tokens"] = "0" * 40
    root = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"gone.zip.*wiki.test.tokens has SHA-1.*Put them"):
        wikitext(str(root))
    assert not list(root.iterdir())


def test_a_folder_of_text_may_hold_files_or_folders(tmp_path):
    (tmp_path / "train").mkdir()
    for name, words in {"b.txt": "third\n", "a.txt": "first\nsecond", "c.md": "not this\n"}.items():
        (tmp_path / "train" / name).write_text(words)
    (tmp_path / "valid.txt").write_text("second first\n")
    splits = text_folder(str(tmp_path), bptt=1)
    assert list(splits) == ["train", "valid"]
    inputs, targets = zip(*ranks(splits["train"], 1, 1)[0].start(0, 0, {}), strict=True)
    read = [*map(int, inputs), int(targets[-1])]
    first, end, second, _, third, _ = read  # <eos> 3 times, the others once, by first appearance
    assert (first, end, second, third) == (1, 0, 2, 3)
    valid = next(ranks(splits["valid"], 1, 1, is_training=False)[0].start(0, 0, {}))
    assert list(map(int, valid)) == [second, first]


def test_a_folder_without_text_to_train_or_evaluate_on_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has none of them.*--configs.dataset.root FOL"):
        text_folder(str(tmp_path))
    (tmp_path / "train.txt").write_text("a b\n")
    with pytest.raises(FileNotFoundError, match=r"likewise valid or test; it has train"):
        text_folder(str(tmp_path))
    (tmp_path / "test.txt").write_text("a b\n")
    with pytest.raises(ValueError, match=r"bptt is -1"):
        text_folder(str(tmp_path), bptt=-1)
    assert list(text_folder(str(tmp_path))) == ["train", "test"]
