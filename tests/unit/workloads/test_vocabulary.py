import pytest
import torch

from workloads import vocabulary
from workloads.vocabulary import Vocabulary, read_or_count, read_texts, with_counts


@pytest.fixture
def folder(tmp_path):
    """WikiText-2 in small: lines with spaces around them, blank lines, unknown words in place."""
    train = " = the title = \n \n the cat <unk> the dog \n a cat , the \u2013 dog"
    (tmp_path / "train.txt").write_text(train, encoding="utf-8")
    (tmp_path / "test.txt").write_bytes(b" a bird the cat \r\n\n")
    return tmp_path


def files(folder):
    return {split: [folder / f"{split}.txt"] for split in ("train", "test")}


def told(vocab, text):
    return [vocab.words[number].decode() for number in text.tolist()]


def test_words_are_numbered_by_their_counts_and_each_line_has_an_end(folder):
    vocab, texts = read_texts(files(folder), None)
    words = "= the title = E E the cat <unk> the dog E a cat , the \u2013 dog E".replace(
        "E", "<eos>"
    )
    assert told(vocab, texts["train"]) == words.split()
    assert texts["train"].dtype == torch.int32
    first_seen = list(dict.fromkeys(words.split()))
    expected = sorted(first_seen, key=lambda word: -words.split().count(word))  # stable
    assert [word.decode() for word in vocab.words] == expected
    assert vocab.word_counts.tolist() == [words.split().count(word) for word in expected]
    assert vocab.word_counts.dtype == torch.int64
    assert vocab.facts["num_words"] == len(expected) == len(vocab)


def test_words_not_trained_on_are_unknown(folder):
    vocab, texts = read_texts(files(folder), None)
    assert told(vocab, texts["test"]) == "a <unk> the cat <eos> <eos>".split()


def test_a_limited_vocabulary_keeps_the_most_frequent_and_counts_the_others_as_unknown(folder):
    full, _ = read_texts(files(folder), None)
    vocab, texts = read_texts(files(folder), 4)
    # 19 words: the 4, <eos> 4, and of those seen twice = came first; the others are 9 with <unk>
    assert [word.decode() for word in vocab.words] == ["<unk>", "the", "<eos>", "="]
    assert vocab.word_counts.tolist() == [9, 4, 4, 2]
    assert vocab.word_counts.sum() == full.word_counts.sum() == len(texts["train"])
    counted = torch.bincount(texts["train"], minlength=4)
    assert torch.equal(counted, vocab.word_counts)


def test_rare_words_can_be_left_out_and_special_ones_stay():
    words = [b"a", b"b", b"<unk>", b"c", b"<eos>"]
    vocab = Vocabulary.most_frequent(words, torch.tensor([5, 2, 0, 3, 1]), None, min_count=3)
    assert vocab.words == [b"a", b"c", b"<unk>", b"<eos>"]
    assert vocab.word_counts.tolist() == [5, 3, 2, 1]


def test_the_size_of_the_pieces_read_changes_nothing(folder, monkeypatch):
    _, whole = read_texts(files(folder), None)
    for size in (1, 7, 33):
        monkeypatch.setattr(vocabulary, "_PIECE_BYTES", size)
        vocab, texts = read_texts(files(folder), None)
        assert torch.equal(texts["train"], whole["train"])
        lines = (folder / "train.txt").read_bytes().split(b"\n")
        by_lines = [number for line in lines for number in vocab.encode_line(line)]
        assert by_lines == whole["train"].tolist()


def test_published_spellings_of_the_special_words_are_taken():
    counts = {b"<eos>": 7, b"dog": 5, b"cat": 4, b"rare": 1}
    for end in (b"</S>", b"<S>"):
        vocab = with_counts([b"cat", end, b"<UNK>", b"dog", b"never"], counts)
        assert vocab.word_counts.tolist() == [4, 7, 1, 5, 0]
        assert vocab.encode_line(b"dog rare") == [3, 2, 1]
    both = with_counts([b"<S>", b"</S>", b"<UNK>"], counts)  # the sentence ends with </S>
    assert (both.end, both.word_counts.tolist()) == (1, [0, 7, 10])


def test_bad_vocabularies_are_refused():
    counts = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"no word for the end of a line.*</S>"):
        Vocabulary([b"a", b"b", b"<unk>"], counts)
    with pytest.raises(ValueError, match=r"no word for unknown words.*<UNK>"):
        Vocabulary([b"a", b"b", b"<eos>"], counts)
    with pytest.raises(ValueError, match=r"'<eos>' twice"):
        Vocabulary([b"<eos>", b"<unk>", b"<eos>"], counts)
    with pytest.raises(ValueError, match=r"max_words is 2; allowed: None, or 3 or more"):
        Vocabulary.most_frequent([b"a", b"<unk>", b"<eos>"], counts, 2)


def test_counts_are_kept_and_made_anew_for_other_files(folder, monkeypatch):
    paths = [folder / "train.txt", folder / "test.txt"]
    first = read_or_count(paths, str(folder), None)
    assert list(first.items())[:2] == [(b"<eos>", 6), (b"the", 5)]
    assert first[b"cat"] == 3 and first[b"bird"] == 1
    kept = list(folder.glob("word_counts.2_files.*"))
    assert len(kept) == 1 and kept[0].read_bytes().startswith(b"<eos>\t6\nthe\t5\n")
    assert not list(folder.glob(".*"))  # nothing half written is left
    with monkeypatch.context() as patched:
        patched.setattr(vocabulary, "count_words", lambda paths: pytest.fail("counted again"))
        again = read_or_count(paths, str(folder), None)
    assert list(again.items()) == list(first.items())
    (folder / "test.txt").write_bytes(b"more words\n")
    assert read_or_count(paths, str(folder), None)[b"more"] == 1


def test_an_interrupted_count_leaves_nothing(folder, monkeypatch):
    def interrupted(paths):
        assert len(list(folder.glob(".*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(vocabulary, "count_words", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_or_count([folder / "train.txt"], str(folder), None)
    assert sorted(path.name for path in folder.iterdir()) == ["test.txt", "train.txt"]


def test_counts_that_cannot_be_written_are_told_with_the_remedy(folder):
    with pytest.raises(ValueError, match=r"cannot be written.*--configs.dataset.counts FILE"):
        read_or_count([folder / "train.txt"], str(folder), str(folder / "no" / "such" / "counts"))
