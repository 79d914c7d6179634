import re

import pytest
import torch

from dgc.wire import codec as codec_module
from dgc.wire.codec import Codec
from dgc.wire.entries import entry_bits, from_owner, to_owner
from parsimony_kernels.packing.message import INDEX_CODINGS, VALUE_DTYPES, MessageError

NAMES, NUMELS = ("a", "b", "c"), (1000, 33, 70_000)
CODINGS = [(value, index) for value in VALUE_DTYPES for index in INDEX_CODINGS]


def entries(seed, counts=(10, 0, 33), dim=1):
    """Return (indices, values) of each tensor."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for numel, count in zip(NUMELS, counts, strict=True):
        indices = torch.randperm(numel, generator=generator)[:count].sort().values
        parts.append((indices, torch.randn(count * dim, generator=generator)))
    return parts


def message(codec=None, bad=(), **kwargs):
    codec = codec or Codec(NAMES, NUMELS)
    return codec, codec.encode(*codec.join(entries(0, **kwargs)), bad)


@pytest.mark.parametrize("dim", [1, 7])
@pytest.mark.parametrize(("value_dtype", "index_coding"), CODINGS)
def test_messages_of_all_ranks_come_back_as_they_went(value_dtype, index_coding, dim):
    codec = Codec(NAMES, NUMELS, dim, value_dtype, index_coding)
    sent = [entries(0, dim=dim), entries(1, (0, 0, 0), dim), entries(2, (1000, 33, 1), dim)]
    joined = [codec.join(parts) for parts in sent]
    encoded = [
        codec.encode(*pair, bad) for pair, bad in zip(joined, [(), (0, 2), (1,)], strict=True)
    ]
    for text, (positions, _) in zip(encoded, joined, strict=True):
        assert text.numel() == codec.message_bytes(positions.numel())
    decoded = codec.decode(torch.cat(encoded), 3)
    assert [found.bad for found in decoded] == [(), (0, 2), (1,)]
    for found, parts, (positions, values) in zip(decoded, sent, joined, strict=True):
        assert torch.equal(found.positions_K, positions)
        assert torch.equal(found.values_M, codec.round_values(values))
        again = codec.encode(found.positions_K, found.values_M)
        assert torch.equal(codec.decode_one(again).values_M, found.values_M)
        for (indices, values), (original, _) in zip(
            codec.split(found.positions_K, found.values_M), parts, strict=True
        ):
            assert torch.equal(indices, original) and values.numel() == dim * indices.numel()


def test_the_documented_example_is_written():
    codec = Codec(("a", "b"), (6, 10), value_dtype="mxfp4", index_coding="elias_fano")
    parts = [([1], [1.0]), ([1, 9], [-0.4, 6.0])]
    positions, values = codec.join([tuple(map(torch.tensor, part)) for part in parts])
    text = codec.encode(positions, values)
    example = codec_module.__doc__.split("Example: ")[1]
    words = re.findall(r"\b[0-9a-f]{8}\b", example)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in text.view(torch.int32).tolist()] == words
    assert codec.decode_one(text).values_M.tolist() == [1.0, -0.5, 6.0]


def test_the_offsets_are_where_tensors_begin():
    codec = Codec(NAMES, NUMELS)
    assert codec.offsets == (0, 1000, 1033) and codec.universe == 71_033


def test_a_tensor_alone_is_split_without_a_look():
    codec = Codec(("a",), (1000,), dim=2)
    positions, values = torch.tensor([3, 999]), torch.arange(4.0)
    ((indices, same),) = codec.split(positions, values)
    assert indices is positions and same is values


@pytest.mark.parametrize(("value_dtype", "index_coding"), CODINGS)
def test_entry_bits_are_near_what_a_message_has(value_dtype, index_coding):
    codec = Codec(("a",), (2**24,), 1, value_dtype, index_coding)
    for density in (0.5, 0.1, 0.01, 0.001, 0.0003):
        num_entries = int(density * 2**24)
        bits = 8 * codec.message_bytes(num_entries) / num_entries
        assert bits == pytest.approx(entry_bits(density, value_dtype, index_coding), rel=0.01)


# ---- owners --------------------------------------------------------------------------------------


@pytest.mark.parametrize("universe", [1, 255, 256, 257, 5000, 71_033])
@pytest.mark.parametrize("num_owners", [1, 2, 3, 64])
def test_owners_divide_the_positions_among_them(universe, num_owners):
    codec = Codec(("a",), (universe,), index_coding="elias_fano")
    positions = torch.arange(universe)
    owner, local = to_owner(positions, num_owners)
    assert torch.equal(owner, positions // 256 % num_owners)
    parts = [codec.of_owner(number, num_owners) for number in range(num_owners)]
    assert sum(part.universe for part in parts) == universe
    for number, part in enumerate(parts):
        mine = positions[owner == number]
        assert torch.equal(local[owner == number], torch.arange(part.universe))
        assert torch.equal(from_owner(local[owner == number], number, num_owners), mine)
        some = local[owner == number][::3].contiguous()
        text = part.encode(some, torch.ones(some.numel()))
        assert torch.equal(part.decode_one(text).positions_K, some)


def test_messages_of_another_owners_part_are_refused():
    codec = Codec(NAMES, NUMELS, index_coding="elias_fano")
    text = codec.of_owner(1, 4).encode(torch.tensor([5]), torch.ones(1))
    assert codec.of_owner(1, 4).decode_one(text).positions_K.tolist() == [5]
    for other in (codec, codec.of_owner(0, 4), codec.of_owner(1, 5), codec.of_owner(1, 2)):
        with pytest.raises(MessageError, match="written for other tensors"):
            other.decode_one(text)
    for make in (lambda: codec.of_owner(4, 4), lambda: codec.of_owner(0, 2).of_owner(0, 2)):
        with pytest.raises(ValueError, match="owner 4|no owners of its own"):
            make()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda m: m[:10], "message 0: 8 bytes; its header|message 0: 10 bytes; a message has"),
        (lambda m: m[:12], "message 0: 12 bytes; its header alone has 20"),
        (lambda m: m[:-8], "message 0: .* where its header says"),
        (lambda m: torch.cat([m, m[:8]]), "8 bytes follow the last message"),
        (lambda m: torch.zeros_like(m), "starts with 0x0"),
    ],
)
def test_messages_that_are_not_whole_are_refused(damage, complaint):
    codec, encoded = message()
    with pytest.raises(MessageError, match=complaint):
        codec.decode(damage(encoded), 1)


def test_a_message_of_other_settings_is_refused():
    others = [
        Codec(NAMES, NUMELS, value_dtype="float16"),
        Codec(NAMES, NUMELS, index_coding="int64"),
        Codec(NAMES, NUMELS, dim=2),
        Codec(("a", "b", "d"), NUMELS),
        Codec(NAMES, (1000, 34, 69_999)),
    ]
    _, encoded = message()
    for codec in others:
        with pytest.raises(MessageError, match="message 0: written for other tensors.*bucket of a"):
            codec.decode(encoded, 1)


def test_the_message_that_is_damaged_is_named():
    codec, encoded = message(Codec(NAMES, NUMELS, value_dtype="mxfp8", index_coding="elias_fano"))
    gathered = torch.cat([encoded] * 3)
    gathered[encoded.numel() + 40] ^= 1
    with pytest.raises(MessageError, match="message 1: its checksum"):
        codec.decode(gathered, 3)
    with pytest.raises(MessageError, match="message 3: 0 bytes"):
        codec.decode(gathered, 4)


def test_random_damage_among_joined_messages_is_an_error():
    codec, encoded = message(Codec(NAMES, NUMELS, value_dtype="mxfp4", index_coding="elias_fano"))
    gathered = torch.cat([encoded] * 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        damaged = gathered.clone()
        place = torch.randint(gathered.numel(), (), generator=generator)
        damaged[place] ^= int(torch.randint(1, 256, (), generator=generator))
        with pytest.raises(MessageError):
            codec.decode(damaged, 3)


def test_what_no_codec_can_do_is_refused():
    with pytest.raises(ValueError, match="set index_coding to 'elias_fano' or 'int64'"):
        Codec(("a",), (2**31 + 1,), index_coding="int32")
    for index_coding in ("int64", "elias_fano"):
        Codec(("a",), (2**31 + 1,), index_coding=index_coding)
    with pytest.raises(ValueError, match="value_dtype 'float8'; allowed: float32, float16, mxfp8"):
        Codec(("a",), (5,), value_dtype="float8")
    with pytest.raises(ValueError, match="index_coding 'gaps'; allowed: int32"):
        Codec(("a",), (5,), index_coding="gaps")
    with pytest.raises(ValueError, match="entries of 1 tensors; allowed: 3, all"):
        Codec(NAMES, NUMELS).join(entries(0)[:1])
