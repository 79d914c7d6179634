import gzip
import io
import random

import pytest
import torch

from workloads.text_files import line_spans
from workloads.text_stream import lm1b, text_shards


def write_shards(folder, num_shards, num_lines=40, seed=0, last_newline=True):
    """Words that occur once each, in lines of 0 to 9 of them; returns the lines of every shard."""
    generator, lines, word = random.Random(seed), [], 0
    (folder / "train").mkdir(parents=True)
    for shard in range(num_shards):
        lines.append([])
        for _ in range(num_lines):
            length = generator.choice([0, 1, 3, 9])
            lines[-1].append([f"w{word + n}" for n in range(length)])
            word += length
        lines[-1].append([f"end{shard}"])  # an empty line without a newline would be none
        content = "\n".join(" ".join(line) for line in lines[-1]) + "\n" * last_newline
        (folder / "train" / f"shard-{shard}").write_text(content)
    (folder / "test").mkdir()
    (folder / "test" / "shard").write_text("w1 w2 never\n")
    return lines


def rank_batches(split, rank=0, world_size=1, batch_size=3, seed=1, limit=None):
    return split.batches(
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        is_training=True,
        samples_per_epoch=limit,
    )


def saved(position):
    stream = io.BytesIO()
    torch.save(position, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def columns_of(epoch):
    """Return the columns' words of an epoch's batches, the last target included."""
    words = torch.cat([inputs for inputs, _ in epoch])
    targets = torch.cat([targets for _, targets in epoch])
    assert torch.equal(words[1:], targets[:-1])  # goes on from batch to batch
    return torch.cat([words, targets[-1:]]).t().tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"a",
        b"a\n",
        b"\n\n\n",
        b"a b\n\nc\n\n\nd e f g h i j k l m\nn",
        b"one line that is much longer than its parts\nb\nc",
        b"a\r\nbb\r\n",
        b"".join(b"%d\n" % n**3 for n in range(100)),
    ],
)
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 50])
def test_each_line_is_in_one_part(tmp_path, content, num_parts):
    path = tmp_path / "shard"
    path.write_bytes(content)
    spans = line_spans(path, num_parts)
    assert len(spans) == num_parts
    parts = [content[begin:end] for begin, end in spans]
    assert b"".join(parts) == content
    lines = [line for part in parts for line in io.BytesIO(part)]
    assert lines == list(io.BytesIO(content))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("last_newline", [True, False])
def test_ranks_read_lines_of_their_own_whole_and_in_order(tmp_path, world_size, last_newline):
    lines = write_shards(tmp_path, 3, last_newline=last_newline)
    split = text_shards(str(tmp_path), bptt=4)["train"]
    assert len(split) == sum(len(line) + 1 for shard in lines for line in shard)
    vocab = split._vocabulary
    whole = {tuple(vocab.encode_line(" ".join(line).encode())) for shard in lines for line in shard}
    seen = []
    every = [rank_batches(split, rank, world_size, 2) for rank in range(world_size)]
    assert len({batches.num_batches for batches in every}) == 1
    assert every[0].num_batches == len(split) // (world_size * 2 * 4)
    for batches in every:
        epoch = list(batches.start(0, 0, {}))
        assert len(epoch) == batches.num_batches
        assert all(x.shape == y.shape == (4, 2) and x.dtype == torch.int64 for x, y in epoch)
        mine = set()
        for column in columns_of(epoch):
            ends = [place for place, word in enumerate(column) if word == vocab.end]
            for begin, end in zip([-1, *ends], ends, strict=False):
                line = tuple(column[begin + 1 : end + 1])
                assert line in whole
                mine.add(line)
        seen.append({line for line in mine if len(line) > 1})
    for rank, mine in enumerate(seen):
        assert mine and not mine & set().union(*seen[:rank])
    if world_size == 1:  # all lines but those that the last batch does not reach
        assert len(seen[0]) >= 0.95 * len({line for line in whole if len(line) > 1})


def test_every_line_is_read_once_before_one_is_read_again(tmp_path):
    lines = write_shards(tmp_path, 4)
    split = text_shards(str(tmp_path), bptt=4)["train"]
    for world_size in (1, 3):
        read = []
        for rank in range(world_size):
            batches = rank_batches(split, rank, world_size)
            reading = batches._reading(0, rank)
            stream = batches._read_lines(reading)
            mine = sum(
                (tmp_path / "train" / f"shard-{s}").read_bytes()[b:e].count(b"\n")
                for s, b, e in reading
            )
            read += [tuple(next(stream)) for _ in range(mine)]
            assert tuple(next(stream)) == read[-mine]  # around again
        encode = split._vocabulary.encode_line
        expected = [tuple(encode(" ".join(line).encode())) for shard in lines for line in shard]
        assert sorted(read) == sorted(expected)


@pytest.mark.parametrize("bptt, batch_size", [(1, 1), (4, 3), (25, 1)])
def test_an_epoch_taken_up_at_any_position_goes_on_bit_for_bit(tmp_path, bptt, batch_size):
    write_shards(tmp_path, 5, num_lines=12, last_newline=False)
    split = text_shards(str(tmp_path), bptt=bptt)["train"]
    batches = rank_batches(split, 1, 2, batch_size)
    for epoch in (0, 1):
        whole, positions = [], [{}]
        for batch in batches.start(epoch, 0, {}):
            whole.append(batch)
            positions.append(saved(batches.position()))
        assert len({position["place"] for position in positions[1:]}) > 1  # past shards' ends
        assert any(len(position["words"]) > batch_size for position in positions[1:])  # mid-line
        for first, position in enumerate(positions):
            for begin in (position, {}):  # {}: replayed
                again = rank_batches(split, 1, 2, batch_size)
                rest = list(again.start(epoch, first, begin))
                assert len(rest) == len(whole) - first
                for ours, theirs in zip(rest, whole[first:], strict=True):
                    assert all(map(torch.equal, ours, theirs))
                if first < len(whole):
                    ended = saved(again.position())
                    assert all(
                        torch.equal(torch.as_tensor(ended[k]), torch.as_tensor(positions[-1][k]))
                        for k in positions[-1]
                    )


@pytest.mark.parametrize("pack", [gzip.compress, lambda text: b"\xef\xbb\xbf" + text])
def test_packed_and_marked_shards_give_the_batches_and_positions_of_plain_ones(tmp_path, pack):
    write_shards(tmp_path / "plain", 3, last_newline=False)
    for path in list((tmp_path / "plain").glob("*/shard*")):
        packed = tmp_path / "packed" / path.relative_to(tmp_path / "plain")
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(pack(path.read_bytes()))
    plain, packed = (text_shards(str(tmp_path / name), bptt=5) for name in ("plain", "packed"))
    assert torch.equal(plain["test"]._words, packed["test"]._words)
    for rank in range(3):
        one, other = (rank_batches(split["train"], rank, 3) for split in (plain, packed))
        positions = [{}]
        for ours, theirs in zip(one.start(0, 0, {}), other.start(0, 0, {}), strict=True):
            assert all(map(torch.equal, ours, theirs))
            positions.append(saved(one.position()))
            assert str(positions[-1]) == str(saved(other.position()))
        for first, position in enumerate(positions[:-1]):  # of the plain run, by the packed one
            batches = [next(each.start(0, first, position)) for each in (one, other)]
            assert all(map(torch.equal, *batches))


def test_counts_of_packed_shards_are_not_those_that_were_once_made_of_their_bytes(tmp_path):
    write_shards(tmp_path, 1)
    path = tmp_path / "train/shard-0"
    path.write_bytes(gzip.compress(path.read_bytes()))
    old = tmp_path / f"word_counts.1_files.{path.stat().st_size}_bytes.tsv"
    old.write_bytes(b"garbage\t3\n<eos>\t1\n")
    assert b"garbage" not in text_shards(str(tmp_path), bptt=2)["train"]._vocabulary.words


def test_taking_up_a_position_reads_nothing_that_came_before(tmp_path):
    write_shards(tmp_path, 3)
    split = text_shards(str(tmp_path), bptt=4)["train"]
    batches = rank_batches(split)
    epoch = batches.start(0, 0, {})
    for _ in range(12):
        next(epoch)
    position = batches.position()
    again, read = rank_batches(split), []
    encode = again._vocabulary.encode_line
    again._vocabulary.encode_line = lambda line: read.append(line) or encode(line)
    try:
        next(again.start(0, 12, position))
    finally:
        del again._vocabulary.encode_line
    assert 1 <= len(read) <= 12  # what three columns of four rows may take, with empty lines


def test_epochs_draw_the_order_of_shards_from_the_seed(tmp_path):
    write_shards(tmp_path, 6)
    split = text_shards(str(tmp_path), bptt=4)["train"]

    def begins(seed, epochs=range(6)):
        batches = rank_batches(split, seed=seed)
        return [next(batches.start(epoch, 0, {}))[0].tolist() for epoch in epochs]

    assert begins(1) == begins(1)
    assert begins(1) != begins(2)
    assert len({str(batch) for batch in begins(1)}) >= 3


def test_a_limit_counts_all_ranks(tmp_path):
    write_shards(tmp_path, 2)
    split = text_shards(str(tmp_path), bptt=4)["train"]
    batches = rank_batches(split, 1, 2, 3, limit=20)
    assert (batches.num_batches, batches.samples_per_batch) == (3, 3)
    assert len(list(batches.start(0, 0, {}))) == 3


def test_a_rank_whose_lines_end_goes_on_from_its_first(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test.txt").write_text("a b\n")
    # halves of equal bytes: one long word against many short ones
    (tmp_path / "train" / "shard").write_text("b" * 40 + "\n" + "a " * 20 + "\n")
    split = text_shards(str(tmp_path), test="test.txt", bptt=2)["train"]
    first, second = (rank_batches(split, rank, 2, 1) for rank in range(2))
    assert first.num_batches == second.num_batches == 23 // 4
    long_word, end = split._vocabulary.numbers[b"b" * 40], split._vocabulary.end
    [column] = columns_of(list(first.start(0, 0, {})))
    assert column == [long_word, end] * 5 + [long_word]


def test_shards_refuse_what_they_cannot_do(tmp_path):
    write_shards(tmp_path, 2)
    splits = text_shards(str(tmp_path), bptt=4)
    split = splits["train"]
    with pytest.raises(ValueError, match=r"streamed for training only"):
        split.batches(
            batch_size=1, rank=0, world_size=1, seed=0, is_training=False, samples_per_epoch=None
        )
    with pytest.raises(ValueError, match=r"do not fill one batch of 500 texts a rank x 2 ranks"):
        rank_batches(split, 0, 2, 500)
    batches = rank_batches(split)
    next(batches.start(0, 0, {}))
    with pytest.raises(ValueError, match=r"one of 3 texts a rank.*here are 2 texts"):
        rank_batches(split, batch_size=2).start(0, 1, batches.position())
    with pytest.raises(FileNotFoundError, match=r"no file nothing.*--configs.dataset.test GLOB"):
        text_shards(str(tmp_path), test="nothing*")
    with pytest.raises(ValueError, match=r"shard is both trained and evaluated on"):
        text_shards(str(tmp_path), train="*/*")
    with pytest.raises(ValueError, match=r"max_words is 5, but vocabulary v"):
        text_shards(str(tmp_path), vocabulary="v", max_words=5)
    with pytest.raises(FileNotFoundError, match=r"no vocabulary .*a word a line"):
        text_shards(str(tmp_path), vocabulary=str(tmp_path / "v"))


def test_more_ranks_than_lines_are_refused_on_all_ranks(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard").write_text("a b c d e f g h\n" * 2)
    (tmp_path / "test").write_text("a b\n")
    split = text_shards(str(tmp_path), test="test", bptt=1)["train"]
    for rank in range(3):
        with pytest.raises(ValueError, match=r"none of the shards' lines is for ranks \[\d\] of 3"):
            rank_batches(split, rank, 3, 1)


def test_kept_counts_are_no_shard(tmp_path):
    (tmp_path / "a.txt").write_text("a b c\n")
    (tmp_path / "b.txt").write_text("a b\n")
    for _ in range(2):
        splits = text_shards(str(tmp_path), train="[!b]*", test="b.txt", bptt=1)
        assert len(splits["train"]) == 4
        assert len(list(tmp_path.iterdir())) == 3


@pytest.fixture
def billion(tmp_path):
    """The published layout in small: 99 shards, and 50 held-out files, of which 2 are here."""
    train = tmp_path / "training-monolingual.tokenized.shuffled"
    held_out = tmp_path / "heldout-monolingual.tokenized.shuffled"
    train.mkdir()
    held_out.mkdir()
    for shard in range(1, 100):
        (train / f"news.en-{shard:05d}-of-00100").write_text(f"The dog {shard} .\nA dog .\n")
    for shard in range(2):
        file = held_out / f"news.en.heldout-{shard:05d}-of-00050"
        file.write_text("The cat .\n" * (1 + shard))
    return tmp_path


def test_one_billion_word_is_found_as_published(billion, tmp_path_factory):
    splits = lm1b(str(billion), bptt=5)
    assert list(splits) == ["train", "test"]
    assert (len(splits["train"]), len(splits["test"])) == (99 * 9, 4)
    # <eos> dog . seen 198 times each, The A 99; each number is seen once, less than 3 times
    assert splits["train"].facts["word_counts"].tolist() == [198, 198, 198, 99, 99, 99]
    assert splits["train"].facts["num_words"] == 6
    assert lm1b(str(billion), min_count=1)["train"].facts["num_words"] == 6 + 99
    assert lm1b(str(billion), max_words=4)["train"].facts["num_words"] == 4
    parent = tmp_path_factory.mktemp("parent")
    billion.rename(parent / "1-billion-word-language-modeling-benchmark-r13output")
    assert len(lm1b(str(parent))["train"]) == 99 * 9
    with pytest.raises(FileNotFoundError, match=r"statmt.org.*--configs.dataset.root FOLDER"):
        lm1b(str(billion))


@pytest.mark.parametrize("lines", ["dog\n<S>\n</S>\n<UNK>\n", "dog 198\n<S> 0\n</S> 1\n<UNK> 7\n"])
def test_one_billion_word_takes_a_published_vocabulary(billion, tmp_path, lines):
    (tmp_path / "vocabulary.txt").write_text(lines)
    splits = lm1b(str(billion), vocabulary=str(tmp_path / "vocabulary.txt"), bptt=4)
    assert splits["train"].facts["word_counts"].tolist() == [198, 0, 198, 495]
    inputs, targets = next(
        splits["test"]
        .batches(
            batch_size=1, rank=0, world_size=1, seed=0, is_training=False, samples_per_epoch=None
        )
        .start(0, 0, {})
    )
    assert inputs.flatten().tolist()[:3] == [3, 3, 3]
    assert targets.flatten().tolist() == [3, 3, 2, -100]
