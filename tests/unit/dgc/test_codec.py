import pytest
import torch

from dgc.codec import Codec, MessageError
from dgc.sparsify import SparseGrad

NAMES, NUMELS = ("a", "b", "c"), (1000, 33, 70_000)
DTYPES = [("float32", "int32"), ("float16", "int32"), ("float32", "int64"), ("float16", "int64")]


def entries(seed, counts=(10, 0, 33)):
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for numel, count in zip(NUMELS, counts, strict=True):
        indices = torch.randperm(numel, generator=generator)[:count].sort().values
        grads.append(SparseGrad(torch.randn(count, generator=generator), indices, numel))
    return grads


def message(codec=None, **kwargs):
    codec = codec or Codec(NAMES, NUMELS)
    return codec, codec.encode(entries(0, **kwargs))


@pytest.mark.parametrize(("value_dtype", "index_dtype"), DTYPES)
def test_messages_of_all_ranks_come_back_as_they_went(value_dtype, index_dtype):
    codec = Codec(NAMES, NUMELS, value_dtype, index_dtype)
    sent = [entries(0), entries(1, (0, 0, 0)), entries(2, (1000, 33, 1))]
    gathered = torch.cat([codec.encode(grads) for grads in sent])
    for theirs, ours in zip(codec.decode(gathered, 3), sent, strict=True):
        for decoded, original in zip(theirs, ours, strict=True):
            assert torch.equal(decoded.indices, original.indices)
            assert torch.equal(decoded.values, codec.round_values(original.values))
            assert decoded.numel == original.numel


def test_the_size_of_a_message_is_as_documented():
    _, encoded = message()
    header_and_counts, indices, values = 16 + 3 * 4 + 4, 43 * 4 + 4, 43 * 4 + 4
    assert encoded.numel() == header_and_counts + indices + values


def test_float16_cuts_to_its_range_and_never_sends_infinity():
    codec = Codec(("a",), (4,), "float16")
    values = torch.tensor([1e6, -1e30, 1e-12, 1.0])
    assert codec.round_values(values).tolist() == [65504.0, -65504.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda m: m[:10], "10 bytes, its header needs 28"),
        (lambda m: m[:-8], "bytes of"),
        (lambda m: torch.cat([m, m[:8]]), "8 bytes follow the last message"),
        (lambda m: torch.zeros_like(m), "starts with 0x0"),
    ],
)
def test_a_message_that_is_not_whole_is_refused(damage, complaint):
    codec, encoded = message()
    with pytest.raises(MessageError, match=complaint):
        codec.decode(damage(encoded), 1)


def test_a_message_of_other_settings_is_refused():
    _, encoded = message(Codec(NAMES, NUMELS, "float16"))
    with pytest.raises(MessageError, match="rank 0: written for other tensors or types"):
        Codec(NAMES, NUMELS, "float32").decode(encoded, 1)


@pytest.mark.parametrize("indices", [[5, 5], [7, 3], [-1, 2], [3, 1000]])
def test_indices_that_no_sender_writes_are_refused(indices):
    codec, encoded = message(counts=(2, 0, 0))
    encoded[32:40] = torch.tensor(indices, dtype=torch.int32).view(torch.uint8)
    with pytest.raises(MessageError, match="outside their tensor or not ascending"):
        codec.decode(encoded, 1)


def test_random_damage_is_an_error_or_leaves_the_structure_whole():
    codec, encoded = message()
    generator = torch.Generator().manual_seed(0)
    num_refused = 0
    for _ in range(500):
        damaged = encoded.clone()
        place = torch.randint(encoded.numel(), (), generator=generator)
        damaged[place] = torch.randint(256, (), generator=generator)
        try:
            decoded = codec.decode(damaged, 1)
        except MessageError:
            num_refused += 1
        else:
            for grad in decoded[0]:
                assert ((grad.indices >= 0) & (grad.indices < grad.numel)).all()
    assert num_refused > 100


def test_a_tensor_beyond_32_bit_indices_is_refused():
    with pytest.raises(ValueError, match="set index_dtype to 'int64'"):
        Codec(("a",), (2**31 + 1,), index_dtype="int32")
    Codec(("a",), (2**31 + 1,), index_dtype="int64")
