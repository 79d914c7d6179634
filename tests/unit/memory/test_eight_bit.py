"""The sizes of 8-bit Adam: against bitsandbytes itself, and against its rule."""

import pytest
import torch

from memory.eight_bit import EightBitAdam

SHAPES = [(64, 64), (4095,), (4096,), (4097,), (300, 700), (10,)]


def parameters():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def sizes(optimizer, params):
    """The bytes of each parameter's tensors, without the levels that all share, and counters."""
    found = []
    for p in params:
        state = optimizer.state[p].items()
        found.append(sum(value.nbytes for name, value in state
                         if torch.is_tensor(value) and not name.startswith("qmap")))  # fmt: skip
    return found


def stepped(optimizer, params):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_large_tensors_keep_two_bytes_and_two_scales_a_block():
    params = parameters()
    found = sizes(stepped(EightBitAdam(params), params), params)
    numels = [p.numel() for p in params]
    assert found == [
        2 * n + 2 * 4 * -(-n // 256) if n >= 4096 else 8 * n for n in numels
    ]  # fmt: skip


def test_bitsandbytes_keeps_the_same():
    rival = pytest.importorskip("bitsandbytes")
    params, theirs = parameters(), parameters()
    mine = stepped(EightBitAdam(params), params)
    other = stepped(rival.optim.Adam8bit(theirs), theirs)
    assert sizes(mine, params) == sizes(other, theirs)
