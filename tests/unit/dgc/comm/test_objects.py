import torch
from torch import nn

from dgc.comm import objects
from dgc.comm.objects import make_tensors, pack, unpack

LARGE = torch.arange(float(objects.LEAST_BYTES))


def sent(value):
    """Return what arrives, the number of tensors that went alone, and the message's size."""
    message, tensors = pack(value)
    received = make_tensors(message)
    for mine, theirs in zip(received, tensors, strict=True):
        mine.detach().copy_(theirs)
    return unpack(message, received), len(tensors), message.numel()


def test_large_tensors_are_not_in_the_message():
    value = {"a": [LARGE, 3], "b": LARGE.double()[::2], "c": nn.Parameter(LARGE.bfloat16())}
    found, num_alone, size = sent(value)
    assert num_alone == 3 and size < 2000
    assert found["a"][1] == 3 and torch.equal(found["a"][0], LARGE)
    assert torch.equal(found["b"], value["b"])
    assert type(found["c"]) is nn.Parameter and torch.equal(found["c"], value["c"])


def test_small_tensors_are():
    found, num_alone, _ = sent([torch.ones(3), torch.zeros(0), torch.tensor(2)])
    assert num_alone == 0 and found[0].tolist() == [1, 1, 1] and found[2] == 2


def test_one_tensor_arrives_as_one():
    found, num_alone, _ = sent([LARGE, {"again": LARGE}])
    assert num_alone == 1 and found[0] is found[1]["again"]


def test_a_view_takes_no_more_than_it_shows():
    whole = LARGE.repeat(8)
    message, (alone,) = pack(whole[: len(LARGE)])
    (made,) = make_tensors(message)
    assert made.untyped_storage().nbytes() == alone.nbytes == LARGE.nbytes


def test_strides_arrive_but_for_gaps():
    image = torch.randn(4, 8, 64, 64).to(memory_format=torch.channels_last)
    found, num_alone, _ = sent([image, image[:, :, ::2], LARGE[:1].expand(len(LARGE))])
    assert num_alone == 3
    assert found[0].stride() == image.stride() and torch.equal(found[0], image)
    assert torch.equal(found[1], image[:, :, ::2])
    assert torch.equal(found[2], LARGE[:1].expand(len(LARGE)))


def test_what_is_no_plain_tensor_is_pickled_as_it_is():
    named = LARGE.clone()
    named.note = "kept"
    rows = torch.eye(300).to_sparse()
    found, num_alone, _ = sent([named, rows, LARGE.to("meta"), LARGE.clone().requires_grad_()])
    assert num_alone == 1
    assert found[0].note == "kept" and torch.equal(found[1].to_dense(), torch.eye(300))
    assert found[2].device.type == "meta" and found[3].requires_grad


def test_defaults_do_not_matter():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found, _, _ = sent([LARGE])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found[0].device.type == "cpu" and found[0].dtype == torch.float32
