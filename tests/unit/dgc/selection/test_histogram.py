import struct

import pytest
import torch

from dgc.selection.histogram import Tail, _edge
from parsimony_kernels.buffers.operands import BIN_SHIFT, BINS


def test_edges_are_the_least_floats_of_their_bins():
    for place in range(1, (0x7F800000 >> BIN_SHIFT)):
        assert _edge(place) == struct.unpack("f", struct.pack("I", place << BIN_SHIFT))[0]
    assert _edge(BINS - 1) == torch.finfo(torch.float32).max


@pytest.fixture
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps denormal numbers")
    yield
    torch.set_flush_denormal(False)


def test_magnitudes_near_zero_are_no_trouble_where_denormals_are_flushed(flushing):
    histogram = torch.zeros(BINS, dtype=torch.int32)
    histogram[1], histogram[300] = 5, 3
    tail = Tail(histogram, sample_every=2)
    assert tail.threshold(wanted=10, known=1e-40, count=3) == 0
    assert tail.count(1e-39, known=1e-20, count=2) >= 2
